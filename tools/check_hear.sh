#!/usr/bin/env bash
# Let HEAR's public validator look at the plugin's HEAR module, with a random student or
# the one that is named: tools/check_hear.sh [student]. It imports tensorflow: .venv-hear
# is an environment of its own (about 1.5 GB to fetch where no cache has it), made with
# the Python of .venv-espnet202511 (make check-hear sets that up first).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. tools/own_env.sh

venv=.venv-hear
own_env "${venv}" .venv-espnet202511/bin/python hearvalidator==2021.0.6 \
    tensorflow==2.21.0 torch==2.11.0 safetensors pyyaml

work=$(mktemp -d)
trap 'rm -r "${work}"' EXIT
student=${1:-}
if [ -z "${student}" ]; then
    student=${work}/student
    PYTHONPATH=.:tests "${venv}/bin/python" -c "
import sys
from pathlib import Path
from student_files import write_student
write_student(Path(sys.argv[1]))" "${student}"
fi
# A fault ends the validator with an error; what it prints besides are remarks.
TF_CPP_MIN_LOG_LEVEL=3 PYTHONPATH=. \
    "${venv}/bin/hear-validator" espnet2_spear.hub.hear -m "${student}"

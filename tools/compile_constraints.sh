#!/usr/bin/env bash
# Pin again every version of the two supported environments (needs uv and a network).
# Keeps the versions that still fit; with --upgrade it takes the newest instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

upgrade=${1:-}
if [ -n "${upgrade}" ] && [ "${upgrade}" != --upgrade ]; then
    echo "Usage: tools/compile_constraints.sh [--upgrade]" >&2
    exit 2
fi

pin() { # FILE OLDEST_PYTHON CONSTRAINT...
    local file=$1 python=$2
    shift 2
    echo "compile_constraints: ${file}"
    printf '%s\n' "$@" | uv pip compile --quiet --universal --no-header \
        --no-annotate --python-version "${python}" --all-extras \
        --constraints - --output-file "${file}" ${upgrade:+"${upgrade}"} setup.py
    # ESPnet does not run on these systems.
    sed -i -E "/sys_platform == '(win32|emscripten)'/d" "${file}"
}

py311=constraints/py311-espnet202511.txt
pin constraints/py312-espnet202611.txt 3.12 \
    torch==2.11.0 torchaudio==2.11.0 espnet==202611
# 202511's speaker and language tasks make numbers of arrays, which numpy 2.4 refuses.
pin "${py311}" 3.10 torch==2.11.0 torchaudio==2.11.0 espnet==202511 'numpy<2.4'
# Later Pythons have the other file.
sed -i -E "/python_full_version >= '3\.1[2-9]'/d" "${py311}"

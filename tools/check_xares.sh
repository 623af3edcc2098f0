#!/usr/bin/env bash
# Let XARES' own check look at the plugin's encoder (tests/test_xares.py). xares pins many
# packages: .venv-xares is an environment of its own, made with the Python of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. tools/own_env.sh

venv=.venv-xares
own_env "${venv}" .venv/bin/python xares==0.1.3 torch==2.11.0 torchaudio==2.11.0 pytest \
    safetensors soundfile soxr av omniio pyyaml

# A skipped test is no check: xares must be found.
"${venv}/bin/python" -c "import xares.audio_encoder_checker"
PYTHONPATH=. "${venv}/bin/python" -m pytest -q tests/test_xares.py

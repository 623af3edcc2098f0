#!/usr/bin/env bash
# Let XARES' own check look at the plugin's encoder (tests/test_xares.py). xares pins many
# packages: .venv-xares is an environment of its own, made with the Python of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-xares
base=.venv/bin/python
packages=(xares==0.1.3 torch==2.11.0 torchaudio==2.11.0 pytest safetensors soundfile soxr
    av omniio pyyaml)

stamp=${venv}/.packages
if [ "$(cat "${stamp}" 2>/dev/null)" != "${packages[*]}" ]; then
    "${base}" -m venv --clear "${venv}"
    if "${base}" -m uv --version >/dev/null 2>&1; then
        "${base}" -m uv pip install --python "${venv}/bin/python" "${packages[@]}"
    else
        "${venv}/bin/python" -m pip install --disable-pip-version-check "${packages[@]}"
    fi
    echo "${packages[*]}" >"${stamp}"
fi
# A skipped test is no check: xares must be found.
"${venv}/bin/python" -c "import xares.audio_encoder_checker"
PYTHONPATH=. "${venv}/bin/python" -m pytest -q tests/test_xares.py

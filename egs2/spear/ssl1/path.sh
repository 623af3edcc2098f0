# Environment of the recipe; sourced by run.sh.
# shellcheck shell=bash
MAIN_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
export MAIN_ROOT

if [ -n "${ESPNET_ROOT:-}" ]; then
    # An ESPnet checkout brings its own Python and tools.
    for _script in activate_python.sh extra_path.sh; do
        if [ -e "${ESPNET_ROOT}/tools/${_script}" ]; then
            set +u
            # shellcheck disable=SC1090
            . "${ESPNET_ROOT}/tools/${_script}"
            set -u
        fi
    done
    export PYTHONPATH=${ESPNET_ROOT}${PYTHONPATH:+:${PYTHONPATH}}
elif [ -e "${MAIN_ROOT}/.venv/bin/activate" ]; then
    # shellcheck disable=SC1091
    . "${MAIN_ROOT}/.venv/bin/activate"
fi
export PYTHONPATH=${MAIN_ROOT}${PYTHONPATH:+:${PYTHONPATH}}

# Kaldi tables are sorted in the C locale, whatever the user's; text is UTF-8.
export LC_ALL=C
export PYTHONUTF8=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

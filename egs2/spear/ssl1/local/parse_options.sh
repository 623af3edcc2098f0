# Turn "--name value" and "--name=value" into shell variables; to be sourced.
# The script that sources this sets a default for every option it has, and help_message.
# An option that help_message does not name is an error, and so is one without value;
# where the default is true or false, the value must be one of them.
# shellcheck shell=bash

while [ $# -gt 0 ]; do
    case $1 in
    --help | -h)
        printf '%s\n' "${help_message:?}"
        exit 0
        ;;
    --*=*)
        _option=${1%%=*}
        _value=${1#*=}
        shift
        ;;
    --*)
        _option=$1
        if [ $# -lt 2 ]; then
            echo "$0: option ${_option} needs a value (see --help)" >&2
            exit 2
        fi
        _value=$2
        shift 2
        ;;
    *) break ;;
    esac
    _name=${_option#--}
    _name=${_name//-/_}
    if ! [[ ${_name} =~ ^[a-z][a-z0-9_]*$ ]] || [ -z "${!_name+set}" ] ||
        ! [[ ${help_message:?} =~ --${_name}([^a-z0-9_]|$) ]]; then
        echo "$0: unknown option ${_option} (see --help)" >&2
        exit 2
    fi
    case ${!_name} in
    true | false)
        if [ "${_value}" != true ] && [ "${_value}" != false ]; then
            echo "$0: option ${_option} must be true or false, not '${_value}'" >&2
            exit 2
        fi
        ;;
    esac
    printf -v "${_name}" '%s' "${_value}"
done
unset _option _value _name

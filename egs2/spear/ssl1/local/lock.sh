# Locks of folders. To be sourced by a run.sh that has the function log and the variable
# dry_run.
# shellcheck shell=bash disable=SC2154

lock_fd=

# lock <folder>: what writes there does so alone; held until unlock, the next lock or the
# end, also by what a killed run.sh left running.
lock() {
    [ "${dry_run}" = false ] || return 0
    unlock
    mkdir -p "$1"
    exec {lock_fd}>>"$1/.lock"
    if ! flock --nonblock "${lock_fd}"; then
        log "ERROR: another run works in $1 ($(tail -n 1 "$1/.lock")); wait for it, stop it, or choose other folders or another tag (see --help)"
        exit 1
    fi
    echo "$(hostname), process $$, since $(date)" >"$1/.lock"
}

unlock() {
    [ -n "${lock_fd}" ] || return 0
    exec {lock_fd}>&-
    lock_fd=
}

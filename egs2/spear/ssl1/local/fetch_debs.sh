#!/usr/bin/env bash
# Fetch Debian packages with apt-get, check their hashes and unpack them into a folder.
# Nothing is installed and nothing outside the folder is written; no rights are needed.
set -euo pipefail

help_message="Usage: $0 <manifest> <folder> <package>...
  <manifest>  lines 'sha256  package_version_arch.deb'
  <folder>    gets debs/ (the packages), apt/ (package lists) and root/ (their contents)
Packages already fetched and unpacked are kept. A package file put into <folder>/debs
by hand is used if its hash is right. Messages end with \${REMEDY}: what else to do."

log() { echo "$(date '+%Y-%m-%dT%H:%M:%S') (fetch_debs.sh) $*"; }
fail() {
    echo "ERROR (fetch_debs.sh): $*" >&2
    exit 1
}

[ $# -ge 3 ] || {
    echo "${help_message}" >&2
    exit 2
}
manifest=$1
folder=$2
shift 2

remedy="They are packages of Debian 12; other systems may have other versions.
${REMEDY:-}"

mkdir -p "${folder}"/{debs,root,apt/lists/partial,apt/cache/archives/partial,partial}
folder=$(cd "${folder}" && pwd)
# Two recipes may want packages at once: the second waits for the first.
if command -v flock >/dev/null; then
    exec {lock}>"${folder}/.lock"
    flock --nonblock "${lock}" || {
        log "another run fetches into ${folder}; waiting for it"
        flock "${lock}"
    }
fi

# Prints "hash file" of a package.
manifest_line() {
    awk -v name="$1" '{split($2, part, "_"); if (part[1] == name) print $1, $2}' \
        "${manifest}"
}

is_good() { # <hash> <file>
    [ -f "$2" ] && [ "$(sha256sum <"$2" | cut -d' ' -f1)" = "$1" ]
}

missing=()
for package in "$@"; do
    read -r hash file <<<"$(manifest_line "${package}")"
    [ -n "${file:-}" ] || fail "package '${package}' is not in ${manifest}"
    path=${folder}/debs/${file}
    [ -e "${folder}/root/.${package}.done" ] && continue
    if [ -e "${path}" ] && ! is_good "${hash}" "${path}"; then
        fail "${path} does not match its sha256 ${hash} in ${manifest}; delete the file and run again"
    fi
    if [ ! -e "${path}" ]; then
        version=${file#*_}
        version=${version%_*}
        missing+=("${package}=${version}")
    fi
done

if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || fail "apt-get is not on this system, so that these packages cannot be fetched:
  ${missing[*]}
Copy their .deb files (names in ${manifest}) into ${folder}/debs.
${remedy}"
    log "fetching ${#missing[@]} packages: ${missing[*]}"
    # As root apt-get would switch to a user that may not write here.
    apt=(apt-get -q -o APT::Sandbox::User=root -o Acquire::Retries=3)
    # Package lists in our own folder, when the system's are empty or out of date.
    own_lists=(-o "Dir::State::lists=${folder}/apt/lists" -o "Dir::Cache=${folder}/apt/cache")
    cd "${folder}/partial"
    if ! "${apt[@]}" download "${missing[@]}" >"${folder}/apt/download.log" 2>&1; then
        log "the system's package lists do not have them all; getting fresh lists into ${folder}/apt (a minute)"
        if ! { "${apt[@]}" "${own_lists[@]}" update &&
            "${apt[@]}" "${own_lists[@]}" download "${missing[@]}"; } \
            >"${folder}/apt/download.log" 2>&1; then
            tail -n 20 "${folder}/apt/download.log" >&2
            fail "apt-get could not fetch these packages: ${missing[*]}
The whole output is in ${folder}/apt/download.log. Check the network and that
the package sources include Debian's main section; then run again: what has been fetched is kept.
${remedy}"
        fi
    fi
    cd - >/dev/null
fi

for package in "$@"; do
    read -r hash file <<<"$(manifest_line "${package}")"
    mark=${folder}/root/.${package}.done
    [ -e "${mark}" ] && continue
    if [ ! -e "${folder}/debs/${file}" ]; then
        fetched=${folder}/partial/${file}
        [ -f "${fetched}" ] || fail "apt-get left no file ${fetched}; see ${folder}/apt/download.log"
        if ! is_good "${hash}" "${fetched}"; then
            rm -f "${fetched}"
            fail "${file} as fetched does not match its sha256 ${hash} in ${manifest} and was deleted; run again, and if it stays so, the package source is not to be trusted
${remedy}"
        fi
        mv "${fetched}" "${folder}/debs/${file}"
    fi
    command -v dpkg-deb >/dev/null || fail "dpkg-deb is needed to unpack ${folder}/debs/${file}; install dpkg
${remedy}"
    dpkg-deb -x "${folder}/debs/${file}" "${folder}/root"
    touch "${mark}"
done
log "$# packages are unpacked in ${folder}/root"

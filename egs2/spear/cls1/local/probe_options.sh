# Options that all probes have, and what every one's run.sh begins with. To be sourced by
# run.sh with its arguments, after path.sh, help_message and the options of its own.
# shellcheck shell=bash disable=SC2034

log() { echo "$(date '+%Y-%m-%dT%H:%M:%S') (run.sh) $*"; }

stage=1
stop_stage=4
nj=$(env -u OMP_NUM_THREADS nproc) # which obeys path.sh's 1
ckpt=
tag=
teachers="whisper_tiny_en=../ssl1/conf/teachers/whisper_tiny_en.yaml yamnet=../ssl1/conf/teachers/yamnet.yaml"
seeds="0 1 2"
data_dir=
device=cpu
datadir=data
dumpdir=dump
expdir=exp
downloads=../ssl1/downloads
dry_run=false

: "${help_message:?}"
# shellcheck source=parse_options.sh
. local/parse_options.sh
# shellcheck source=../../ssl1/local/lock.sh
. local/lock.sh
if [ $# -gt 0 ]; then
    log "ERROR: unexpected argument '$1' (see --help)"
    exit 2
fi
if [ "${stop_stage}" -ge 3 ] && [ -z "${ckpt}" ]; then
    log "ERROR: --ckpt is needed: a pre-trained student, such as ../ssl1/exp/spear_mini/valid.loss.best.pth"
    exit 2
fi
if [ -z "${tag}" ] && [ -d "${ckpt}" ]; then tag=$(basename "${ckpt}"); fi
tag=${tag:-$(basename "$(dirname "${ckpt:-none/none}")")}
exp=${expdir}/${tag}

wanted() { [ "${stage}" -le "$1" ] && [ "${stop_stage}" -ge "$1" ]; }
step() { python local/step.py --dry_run "${dry_run}" "$@"; }

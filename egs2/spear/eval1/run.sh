#!/usr/bin/env bash
# How good are a student's frozen features? One table over tasks of speech and audio.
# shellcheck source-path=SCRIPTDIR
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

log() { echo "$(date '+%Y-%m-%dT%H:%M:%S') (run.sh) $*"; }

. ./path.sh

help_message="Usage: ./run.sh --student PATH [options]

Stages (what is finished is done again only if its inputs or options changed)
  1  clips of packages, or your own       -> data/<data>
  2  format to 16 kHz mono, filter        -> dump/raw/<data>
  3  features of all systems              -> exp/features, exp/<tag>/features
  4  probes and table                     -> exp/<tag>/RESULTS.md, RESULTS.json, RESULTS.png

  --student PATH              anything that load_model opens: ours or a released one
  --tag TAG                   name in exp/                      [name of the folder of PATH]
  --tasks \"A B\"               names in tasks/, or YAML files of your own
                              [all that need no package of more than 100 MB]
  --full true|false           the others, too (490 MB more)     [false]
  --teachers \"NAME=F ...\"     to compare with, YAML             [whisper_tiny_en, yamnet]
  --systems \"A B\"             what is compared              [logmel random student teachers]
  --seeds \"0 1 2\"             of the probe
  --stage N, --stop_stage N   first and last stage              [1, 4]
  --nj N                      processes of stage 2, threads of 3 and 4 [number of CPUs]
  --device D                  for the features                  [cpu]
  --datadir, --dumpdir, --expdir, --downloads   folders   [data dump exp ../ssl1/downloads]
  --dry_run true|false        only list commands, inputs and outputs [false]"

stage=1
stop_stage=4
nj=$(env -u OMP_NUM_THREADS nproc) # which obeys path.sh's 1
student=
tag=
tasks=
full=false
teachers="whisper_tiny_en=../ssl1/conf/teachers/whisper_tiny_en.yaml yamnet=../ssl1/conf/teachers/yamnet.yaml"
systems="logmel random student teachers"
seeds="0 1 2"
device=cpu
datadir=data
dumpdir=dump
expdir=exp
downloads=../ssl1/downloads
dry_run=false

. ../ssl1/local/recipe.sh
if [ "${stop_stage}" -ge 3 ] && [ -z "${student}" ]; then
    log "ERROR: --student is needed: a pre-trained student, such as ../ssl1/exp/spear_mini/valid.loss.best.pth"
    exit 2
fi

# Two runs would make the same clips, and the same features of what all students share.
if [ "${stage}" -le 2 ] || [ "${systems}" != student ]; then lock "${dumpdir}/eval1"; fi
python local/evaluate.py --student "${student}" --tag "${tag}" --tasks "${tasks}" \
    --full "${full}" --teachers "${teachers}" --systems "${systems}" --seeds "${seeds}" \
    --stage "${stage}" --stop_stage "${stop_stage}" --nj "${nj}" --device "${device}" \
    --datadir "${datadir}" --dumpdir "${dumpdir}" --expdir "${expdir}" \
    --downloads "${downloads}" --dry_run "${dry_run}"

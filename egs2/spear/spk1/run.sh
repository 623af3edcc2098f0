#!/usr/bin/env bash
# Does a student know who speaks? A linear probe on its layers. See --help.
# shellcheck source-path=SCRIPTDIR
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

. ./path.sh

help_message="Usage: ./run.sh --ckpt CHECKPOINT [options]

Stages (what is finished is done again only if its inputs or options changed)
  1  voices of a game's characters        -> data/characters (labels, groups)
  2  format to 16 kHz mono, filter        -> dump/raw/characters
  3  features of all systems              -> exp/<tag>/features/*.npz
  4  probes and table                     -> exp/<tag>/RESULTS.md, RESULTS.json

  --ckpt PATH                 pre-trained student: file or folder, as for load_model
  --tag TAG                   name in exp/                      [name of the folder of ckpt]
  --teachers \"NAME=F ...\"     teachers to compare with, YAML    [whisper_tiny_en, yamnet]
  --seeds \"0 1 2\"             of the splits and of the random network
  --data_dir DIR              own clips instead of stage 1: a data directory with
                              labels (utterance and speaker) and, if it has them, groups
                              that splits keep together, such as sessions, or splits
                              (utterance and part, in place of drawn ones)
  --num_clips N               of each speaker, in stage 1       [60]
  --stage N, --stop_stage N   first and last stage              [1, 4]
  --nj N                      processes of stage 2              [number of CPUs]
  --device D                  for the features                  [cpu]
  --datadir, --dumpdir, --expdir, --downloads   folders   [data dump exp ../ssl1/downloads]
  --dry_run true|false        only list commands, inputs and outputs [false]"

num_clips=60
. local/probe_options.sh

source=${data_dir:-${datadir}/characters}
if wanted 1 && [ -z "${data_dir}" ]; then
    log "Stage 1: voices of a game's characters"
    lock "${source}"
    if [ "${dry_run}" = false ]; then
        local/fetch_debs.sh local/debs.sha256 "${downloads}" flight-of-the-amazon-queen
    fi
    step --mark "${source}/.done.json" --output "${source}/wav.scp" \
        --output "${source}/labels" --output "${source}/groups" \
        -- python local/data_fotaq.py --root "${downloads}/root" \
        --out_dir "${source}" --num_clips "${num_clips}"
    unlock
fi

min_seconds=1
. local/probe_stages.sh

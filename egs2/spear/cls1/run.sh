#!/usr/bin/env bash
# What does a student know of sound events? A linear probe on its layers. See --help.
# shellcheck source-path=SCRIPTDIR
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

. ./path.sh

help_message="Usage: ./run.sh --ckpt CHECKPOINT [options]

Stages (what is finished is done again only if its inputs or options changed)
  1  labelled clips of packages           -> data/sounds (labels, groups)
  2  format to 16 kHz mono, filter        -> dump/raw/sounds
  3  features of all systems              -> exp/<tag>/features/*.npz
  4  probes and table                     -> exp/<tag>/RESULTS.md, RESULTS.json

  --ckpt PATH                 pre-trained student: file or folder, as for load_model
  --tag TAG                   name in exp/                      [name of the folder of ckpt]
  --teachers \"NAME=F ...\"     teachers to compare with, YAML    [whisper_tiny_en, yamnet]
  --seeds \"0 1 2\"             of the splits and of the random network
  --data_dir DIR              own clips instead of stage 1: a data directory with
                              labels and, if it has them, groups (kept together by
                              splits that are drawn) or splits (utterance and part, in
                              place of such ones), as ../ssl1/local/data_esc50.py writes
  --mix true|false            mixtures of two clips each, which have both labels:
                              multi-label, mAP alone            [false]
  --all_classes true|false    13 classes instead of 10: animal (a package of 161 MB),
                              impact and doors (13 and 8 clips), too [false]
  --max_clips N               of a class, in stage 1            [110]
  --stage N, --stop_stage N   first and last stage              [1, 4]
  --nj N                      processes of stage 2              [number of CPUs]
  --device D                  for the features                  [cpu]
  --datadir, --dumpdir, --expdir, --downloads   folders   [data dump exp ../ssl1/downloads]
  --dry_run true|false        only list commands, inputs and outputs [false]"

mix=false
all_classes=false
max_clips=110
. local/probe_options.sh

sounds=sounds all=()
if [ "${all_classes}" = true ]; then
    if [ -n "${data_dir}" ]; then
        log "ERROR: --all_classes is of stage 1, which --data_dir replaces"
        exit 2
    fi
    sounds=sounds13 all=(--all_classes)
    exp+=_13
fi
source=${data_dir:-${datadir}/${sounds}}
if [ "${mix}" = true ]; then
    exp+=_mix
    clips=${source} formatted=${dumpdir}/raw/$(basename "${source}")
    source=${datadir}/$(basename "${clips}")_mix
    if wanted 1; then
        ./run.sh --stop_stage 2 --data_dir "${data_dir}" --max_clips "${max_clips}" \
            --all_classes "${all_classes}" --nj "${nj}" \
            --datadir "${datadir}" --dumpdir "${dumpdir}" --downloads "${downloads}" \
            --dry_run "${dry_run}"
        log "Stage 1: mixtures of two clips"
        lock "${source}"
        step --mark "${source}/.done.json" --input "${formatted}" \
            --input "${clips}/labels" --input "${clips}/groups" \
            --output "${source}/wav.scp" --output "${source}/labels" \
            -- python local/mix_clips.py --wav_scp "${formatted}/wav.scp" \
            --labels "${clips}/labels" --groups "${clips}/groups" --out_dir "${source}"
        unlock
    fi
elif wanted 1 && [ -z "${data_dir}" ]; then
    log "Stage 1: labelled clips of packages"
    lock "${source}"
    packages=(ufoai-sound sonic-pi-samples asterisk-moh-opsound-g722 openttd-opensfx
        musescore-general-soundfont-small)
    for lang in en es fr it ru; do packages+=("asterisk-core-sounds-${lang}-g722"); done
    [ "${all_classes}" = false ] || packages+=(tuxpaint-stamps-default)
    if [ "${dry_run}" = false ]; then
        local/fetch_debs.sh ../ssl1/local/debs.sha256 "${downloads}" "${packages[@]}"
        python local/unzip_audio.py --out_dir "${downloads}/root/ufoai" \
            "${downloads}"/root/usr/share/games/ufoai/base/*.pk3
    fi
    step --mark "${source}/.done.json" --output "${source}/wav.scp" \
        --output "${source}/labels" --output "${source}/groups" \
        -- python local/sounds.py --root "${downloads}/root" --out_dir "${source}" \
        --max_clips "${max_clips}" "${all[@]}"
    unlock
fi

min_seconds=0.1
. local/probe_stages.sh

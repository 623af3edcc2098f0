#!/usr/bin/env bash
# Stage 1: Kaldi data directories data/{train,valid}, and data/en_{train,dev,test} of
# the embedded default. Called by run.sh in the recipe's folder.
# shellcheck source-path=SCRIPTDIR/..
set -euo pipefail

log() { echo "$(date '+%Y-%m-%dT%H:%M:%S') (data.sh) $*"; }

help_message="Usage: local/data.sh [options], as of run.sh, see there:
  --data_config --speech_dirs --audio_dirs --downloads --datadir --speech_langs --audio_sets
  --valid_fraction --max_valid_hours --max_piece_seconds --max_seconds --max_hours_speech
  --max_hours_audio --max_utts --nj"
data_config=
speech_dirs=
audio_dirs=
downloads=downloads
datadir=data
speech_langs="en es fr it ru"
audio_sets="ufoai sonicpi moh"
valid_fraction=0.025
max_valid_hours=5
max_piece_seconds=10
max_seconds=30
max_hours_speech=inf
max_hours_audio=inf
max_utts=0
nj=2
. local/parse_options.sh

sources=()
pool_opts=()
sets="train valid"
mkdir -p "${datadir}/local"
rm -f "${datadir}/local/weights"

if [ -n "${data_config}" ]; then
    if [ -n "${speech_dirs}${audio_dirs}" ]; then
        echo "ERROR (data.sh): --data_config and --speech_dirs or --audio_dirs exclude each other; folders can be named in the YAML list" >&2
        exit 1
    fi
    log "corpora of ${data_config}"
    rm -rf "${datadir}/local/corpora"
    python local/data_corpora.py --config "${data_config}" \
        --out_dir "${datadir}/local/corpora"
    sources=("${datadir}"/local/corpora/*)
elif [ -n "${speech_dirs}${audio_dirs}" ]; then
    log "own folders: speech '${speech_dirs}', general audio '${audio_dirs}'"
    rm -rf "${datadir}/local/own"
    python local/data_folders.py --out_dir "${datadir}/local/own" \
        --speech_dirs "${speech_dirs}" --audio_dirs "${audio_dirs}"
    sources=("${datadir}"/local/own/*)
else
    packages=()
    [ -z "${speech_langs}" ] || packages+=(asterisk-core-sounds-en)
    for lang in ${speech_langs}; do
        packages+=("asterisk-core-sounds-${lang}-g722")
        [ "${lang}" = en ] || packages+=("asterisk-core-sounds-${lang}")
    done
    root=${downloads}/root
    folders=
    for name in ${audio_sets}; do
        case ${name} in
        ufoai)
            packages+=(ufoai-sound)
            folders+=" ufoai='${root}/ufoai/sound'"
            ;;
        sonicpi)
            packages+=(sonic-pi-samples)
            folders+=" sonicpi='${root}/usr/share/sonic-pi/samples'"
            ;;
        moh)
            packages+=(asterisk-moh-opsound-g722)
            folders+=" moh='${root}/usr/share/asterisk/moh'"
            ;;
        *)
            echo "ERROR (data.sh): unknown audio set '${name}'; known: ufoai sonicpi moh" >&2
            exit 1
            ;;
        esac
    done
    REMEDY="Leave some out by
  ./run.sh --speech_langs \"en\" --audio_sets \"sonicpi\"    (see --help)
or name your own folders of audio instead:
  ./run.sh --speech_dirs \"/path/to/speech\" --audio_dirs \"/path/to/sounds\"
(any folder of audio files, or a Kaldi data directory)." \
        local/fetch_debs.sh local/debs.sha256 "${downloads}" "${packages[@]}"
    if [[ " ${audio_sets} " == *" ufoai "* ]]; then
        python local/unzip_audio.py --out_dir "${root}/ufoai" \
            "${root}"/usr/share/games/ufoai/base/*.pk3
    fi
    for lang in ${speech_langs}; do
        python local/data_asterisk.py --root "${root}" --lang "${lang}" \
            --out_dir "${datadir}/local/asterisk_${lang}"
        sources+=("${datadir}/local/asterisk_${lang}")
    done
    if [ -n "${folders}" ]; then
        python local/data_folders.py --out_dir "${datadir}/local" \
            --audio_dirs "${folders}"
        for name in ${audio_sets}; do
            sources+=("${datadir}/local/${name}")
        done
    fi
    if [[ " ${speech_langs} " == *" en "* ]]; then
        python local/asr_sets.py --source "${datadir}/local/asterisk_en" \
            --dev local/split_en_dev.txt --test local/split_en_test.txt \
            --max_utts "${max_utts}" --out_dir "${datadir}"
        sets+=" en_train en_dev en_test"
    fi
    pool_opts=(--exclude local/{split_en_dev,split_en_test,held_out}.txt --)
fi

python local/pool_data.py --out_dir "${datadir}" --nj "${nj}" \
    --valid_fraction "${valid_fraction}" --max_valid_hours "${max_valid_hours}" \
    --max_piece_seconds "${max_piece_seconds}" --max_seconds "${max_seconds}" \
    --max_hours_speech "${max_hours_speech}" --max_hours_audio "${max_hours_audio}" \
    --max_utts "${max_utts}" "${pool_opts[@]}" "${sources[@]}"
echo "${sets}" >"${datadir}/sets"

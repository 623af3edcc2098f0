#!/usr/bin/env bash
# SPEAR pre-training, from raw audio to a packed model. See --help.
# shellcheck source-path=SCRIPTDIR
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

log() { echo "$(date '+%Y-%m-%dT%H:%M:%S') (run.sh) $*"; }
start_seconds=${SECONDS}

. ./path.sh
. ./cmd.sh
. ./db.sh

help_message="Usage: ./run.sh [--stage 1] [--stop_stage 9] [options]

Stages (inputs and outputs in this folder; what is finished is not done again)
  1  data preparation                 -> data/{train,valid}, embedded: data/en_{train,dev,test}
  2  format to 16 kHz mono            -> dump/raw/org/<set>
  3  filter by length and level       -> dump/raw/<set> (skipped utterances: skipped.txt)
  4  embeddings, quantizer training   -> exp/teachers/<teacher>
  5  tokenization of all data         -> dump/codes/<set>/<teacher>.scp
  6  checks of codes against audio
  7  pre-training                     -> exp/spear_*
  8  pack
  9  upload (dry run unless --skip_upload false)

General
  --stage N, --stop_stage N   first and last stage                  [1, 9]
  --nj N                      parallel jobs on CPUs                 [number of CPUs]
  --ngpu N                    GPUs for training                     [all visible]
  --datadir, --dumpdir, --expdir, --downloads   folders             [data dump exp downloads]

Data (stage 1); without own folders the embedded default is fetched (97 MB)
  --speech_dirs \"A B\"         own folders of speech; any folder of audio files, or
  --audio_dirs \"C D\"          Kaldi data directories; the same for general audio
                              (label=PATH names one; quote a path with spaces inside)
  --speech_langs \"en ...\"     languages of the embedded default     [en es fr it ru]
  --audio_sets \"ufoai ...\"    its general audio                     [ufoai sonicpi moh]
  --valid_fraction X          part of the recordings held out       [0.025]
  --max_piece_seconds X       longer recordings are cut (train, valid) [10]
  --max_hours_speech X, --max_hours_audio X     use only a part     [inf]
  --max_utts N                utterances per set, for smoke runs    [0: all]

Format and filter (stages 2, 3)
  --audio_format flac|wav                                           [flac]
  --min_seconds X, --max_seconds X              others are skipped  [0.5, 30]
  --min_peak_db X             quieter is silence (dB of full scale) [-60]

Teachers (stages 4 to 6); their quantizers are trained on the domain of their name
  --speech_teacher F, --audio_teacher F         [conf/teachers/whisper_tiny_en.yaml, yamnet.yaml]
                              empty: without this teacher
  --speech_codebooks N, --audio_codebooks N     codes per frame     [8, 4]
  --speech_teacher_domains D, --audio_teacher_domains D
                              what each teacher tokenizes; domains that the loss gives
                              the teacher weight 0 need no codes    [speech,audio; audio]
  --quantizer_frames N        embeddings to train a quantizer on    [200000]
  --quantizer_iters N         steps in each of its two phases       [1000]
  --quantizer_args \"...\"    further options of mvq_train, such as \"--batch_frames 128\"

Pre-training, packing, upload (stages 7 to 9)
  --train_config F            its teachers table must fit stage 4   [conf/train_spear_mini.yaml]
  --train_args \"...\"        further options of spear_train, such as \"--max_epoch 5\"
  --tag TAG                   name in exp/                          [from the configuration]
  --inference_model NAME      what is packed                        [valid.loss.best.pth]
  --hf_repo USER/NAME         where stage 9 uploads to
  --skip_upload true|false    true only lists what would be sent    [true]"

stage=1
stop_stage=9
nj=$(env -u OMP_NUM_THREADS nproc) # which obeys path.sh's 1
ngpu=
datadir=data
dumpdir=dump
expdir=exp
downloads=${DOWNLOADS}

speech_dirs=${SPEECH_DIRS}
audio_dirs=${AUDIO_DIRS}
speech_langs="en es fr it ru"
audio_sets="ufoai sonicpi moh"
valid_fraction=0.025
max_piece_seconds=10
max_hours_speech=inf
max_hours_audio=inf
max_utts=0

audio_format=flac
min_seconds=0.5
max_seconds=30
min_peak_db=-60

speech_teacher=conf/teachers/whisper_tiny_en.yaml
audio_teacher=conf/teachers/yamnet.yaml
speech_codebooks=8
audio_codebooks=4
speech_teacher_domains=speech,audio
audio_teacher_domains=audio
quantizer_frames=200000
quantizer_iters=1000
quantizer_args=

train_config=conf/train_spear_mini.yaml
train_args=
tag=
inference_model=valid.loss.best.pth
hf_repo=
skip_upload=true

. local/parse_options.sh
if [ $# -gt 0 ]; then
    log "ERROR: unexpected argument '$1' (see --help)"
    exit 2
fi

fs=16000 # Hz; the teachers and the student expect it

wanted() { [ "${stage}" -le "$1" ] && [ "${stop_stage}" -ge "$1" ]; }

if wanted 1; then
    log "Stage 1: data preparation"
    opts=(--speech_dirs "${speech_dirs}" --audio_dirs "${audio_dirs}"
        --downloads "${downloads}" --datadir "${datadir}"
        --speech_langs "${speech_langs}" --audio_sets "${audio_sets}"
        --valid_fraction "${valid_fraction}" --max_piece_seconds "${max_piece_seconds}"
        --max_hours_speech "${max_hours_speech}" --max_hours_audio "${max_hours_audio}"
        --max_utts "${max_utts}")
    mark=${datadir}/.done
    if [ -e "${mark}" ] && [ "$(<"${mark}")" = "${opts[*]}" ]; then
        log "${datadir} was prepared with these options before; delete ${mark} to redo it"
    else
        if [ -e "${mark}" ]; then
            log "the options differ from those ${datadir} was prepared with: preparing it again"
        fi
        rm -f "${mark}"
        local/data.sh "${opts[@]}" --nj "${nj}"
        echo "${opts[*]}" >"${mark}"
    fi
fi

if wanted 2 || wanted 3; then
    if [ ! -e "${datadir}/.done" ]; then
        log "ERROR: ${datadir} has not been prepared; run stage 1 first"
        exit 1
    fi
    sets=$(<"${datadir}/sets")
fi

if wanted 2; then
    log "Stage 2: format to ${fs} Hz mono ${audio_format}"
    for set in ${sets}; do
        python -m espnet2_spear.bin.spear_format --in_dir "${datadir}/${set}" \
            --out_dir "${dumpdir}/raw/org/${set}" --audio_format "${audio_format}" \
            --fs "${fs}" --nj "${nj}"
    done
fi

if wanted 3; then
    log "Stage 3: filter by length and level"
    for set in ${sets}; do
        python -m espnet2_spear.bin.spear_filter --in_dir "${dumpdir}/raw/org/${set}" \
            --out_dir "${dumpdir}/raw/${set}" --fs "${fs}" \
            --min_seconds "${min_seconds}" --max_seconds "${max_seconds}" \
            --min_peak_db "${min_peak_db}"
    done
fi

if [ "${stop_stage}" -ge 4 ] && [ -z "${ngpu}" ]; then
    ngpu=$(python -c "import torch; print(torch.cuda.device_count())")
fi

# train_quantizer <teacher> <configuration> <codebooks> <threads>
train_quantizer() {
    local dir=${expdir}/teachers/$1 device=cpu
    if [ -e "${dir}/quantizer.pt" ]; then
        log "${dir}/quantizer.pt exists; delete ${dir} to train it again"
        return
    fi
    [ "${ngpu}" -eq 0 ] || device=cuda
    log "teacher '$1': embeddings of ${quantizer_frames} frames, log in ${dir}/embed.log"
    ${cuda_cmd} --gpu "${ngpu}" --num_threads "$4" "${dir}/embed.log" \
        python -m espnet2_spear.bin.spear_embed --teacher_config "$2" \
        --wav_scp "${dumpdir}/raw/train/wav.scp" --domains "$1" \
        --max_frames "${quantizer_frames}" --output_dir "${dir}/embeddings" \
        --device "${device}" --num_threads "$4"
    log "teacher '$1': quantizer of $3 codebooks, log in ${dir}/train.log"
    # shellcheck disable=SC2086
    ${cuda_cmd} --gpu "${ngpu}" --num_threads "$4" "${dir}/train.log" \
        python -m espnet2_spear.bin.mvq_train --embeddings "${dir}/embeddings" \
        --output "${dir}/quantizer.pt" --num_codebooks "$3" \
        --iters_phase1 "${quantizer_iters}" --iters_phase2 "${quantizer_iters}" \
        ${quantizer_args} --device "${device}" --num_threads "$4"
    tail -n 1 "${dir}/train.log"
}

# Both at once, for they would have to share no GPU.
train_both_quantizers() {
    local threads=$(((nj + 1) / 2)) groups=() group failed=0
    set -m # a process group each, so that an interruption reaches all of it
    train_quantizer speech "${speech_teacher}" "${speech_codebooks}" "${threads}" &
    groups+=("$!")
    train_quantizer audio "${audio_teacher}" "${audio_codebooks}" "${threads}" &
    groups+=("$!")
    set +m
    trap 'trap - INT TERM; kill -- "${groups[@]/#/-}" 2>/dev/null; exit 143' INT TERM
    for group in "${groups[@]}"; do wait "${group}" || failed=1; done
    trap - INT TERM
    [ "${failed}" -eq 0 ] || exit 1
}

# tokenize <teacher> <configuration> <domains>
tokenize() {
    local set dir
    [ -n "$2" ] || return 0
    for set in train valid; do
        dir=${dumpdir}/codes/${set}
        log "teacher '$1', set ${set}: tokenization, log in ${dir}/log/$1.log"
        ${cuda_cmd} --gpu "${ngpu}" --num_threads 1 "${dir}/log/$1.log" \
            python -m espnet2_spear.bin.spear_tokenize --teacher_config "$2" \
            --quantizer "${expdir}/teachers/$1/quantizer.pt" --domains "$3" \
            --data_dir "${dumpdir}/raw/${set}" --output_dir "${dir}" --name "$1" \
            --nj "${nj}" --ngpu "${ngpu}"
        tail -n 1 "${dir}/log/$1.log"
    done
}

check_codes() {
    local set opts
    for set in train valid; do
        opts=()
        if [ -n "${speech_teacher}" ]; then
            opts+=(--codes "speech=${dumpdir}/codes/${set}/speech.scp"
                --domains "speech=${speech_teacher_domains}")
        fi
        if [ -n "${audio_teacher}" ]; then
            opts+=(--codes "audio=${dumpdir}/codes/${set}/audio.scp"
                --domains "audio=${audio_teacher_domains}")
        fi
        python -m espnet2_spear.bin.spear_check_codes --data_dir "${dumpdir}/raw/${set}" \
            --output_dir "${dumpdir}/codes/${set}" "${opts[@]}"
    done
}

if wanted 4; then
    log "Stage 4: embeddings and quantizer training"
    if [ -n "${speech_teacher}" ] && [ -n "${audio_teacher}" ] && [ "${ngpu}" -ne 1 ]; then
        train_both_quantizers
    else
        [ -z "${speech_teacher}" ] ||
            train_quantizer speech "${speech_teacher}" "${speech_codebooks}" "${nj}"
        [ -z "${audio_teacher}" ] ||
            train_quantizer audio "${audio_teacher}" "${audio_codebooks}" "${nj}"
    fi
fi

if wanted 5; then
    log "Stage 5: tokenization"
    tokenize speech "${speech_teacher}" "${speech_teacher_domains}"
    tokenize audio "${audio_teacher}" "${audio_teacher_domains}"
fi

if wanted 6; then
    log "Stage 6: checks of codes against audio"
    check_codes
fi

if [ -z "${tag}" ]; then
    tag=$(basename "${train_config}" .yaml)
    tag=${tag#train_}
fi
exp=${expdir}/${tag}
packed=${exp}/${tag}_${inference_model%.pth}.zip

if wanted 7; then
    log "Stage 7: pre-training, log in ${exp}/train.log"
    opts=()
    for part in train valid; do
        raw=${dumpdir}/raw/${part}
        codes=${dumpdir}/codes/${part}
        opts+=("--${part}_data_path_and_name_and_type" "${raw}/wav.scp,speech,sound"
            "--${part}_data_path_and_name_and_type" "${raw}/utt2domain,domain,text"
            "--${part}_shape_file" "${raw}/utt2num_samples")
        for teacher in ${speech_teacher:+speech} ${audio_teacher:+audio}; do
            opts+=("--${part}_data_path_and_name_and_type"
                "${codes}/${teacher}.scp,codes_${teacher},kaldi_ark")
        done
    done
    # shellcheck disable=SC2086
    ${cuda_cmd} --gpu "${ngpu}" --num_threads "${nj}" "${exp}/train.log" \
        python -m espnet2_spear.bin.spear_train --config "${train_config}" \
        --output_dir "${exp}" --ngpu "${ngpu}" --resume true \
        --multiprocessing_distributed true "${opts[@]}" ${train_args}
    grep "results:" "${exp}/train.log" | tail -n 1 | cut -c 1-400
fi

if wanted 8; then
    log "Stage 8: pack -> ${packed}"
    if [ ! -e "${exp}/${inference_model}" ]; then
        log "ERROR: ${exp}/${inference_model} is missing; run stage 7 first"
        exit 1
    fi
    # The link is resolved to the epoch that it stands for.
    cp -L "${exp}/${inference_model}" "${exp}/packed.pth"
    options=()
    [ ! -d "${exp}/images" ] || options+=("${exp}/images")
    python -m espnet2_spear.bin.spear_pack --train_config "${exp}/config.yaml" \
        --model_file "${exp}/packed.pth" --outpath "${packed}" --option "${options[@]}"
fi

if wanted 9; then
    log "Stage 9: upload"
    python -m espnet2_spear.bin.spear_upload --packed "${packed}" \
        --repo_id "${hf_repo:-user/${tag}}" --dry_run "${skip_upload}"
fi

log "Finished stages ${stage} to ${stop_stage} in $((SECONDS - start_seconds)) s"

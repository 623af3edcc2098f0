#!/usr/bin/env bash
# SPEAR pre-training, from raw audio to a packed model. See --help.
# shellcheck source-path=SCRIPTDIR
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

log() { echo "$(date '+%Y-%m-%dT%H:%M:%S') (run.sh) $*"; }
start_seconds=${SECONDS}

user_threads=${OMP_NUM_THREADS:-} # path.sh sets 1 where there is none
. ./path.sh
. ./cmd.sh
. ./db.sh

help_message="Usage: ./run.sh [--stage 1] [--stop_stage 9] [options]

Stages (inputs and outputs in this folder). What is finished is done again only if its
inputs or options changed; then, and when it is skipped, that is said.
  1  data preparation                 -> data/{train,valid}, embedded: data/en_{train,dev,test}
  2  format to 16 kHz mono            -> dump/raw/org/<set>
  3  filter by length and level       -> dump/raw/<set> (skipped utterances: skipped.txt)
  4  embeddings, quantizer training   -> exp/teachers/<teacher>/<quantizer>
  5  tokenization of all data         -> dump/codes/<set>/<codes>.scp
  6  checks of codes against audio    -> dump/codes/<set>/<codes>.check
  7  pre-training                     -> exp/<tag>
  8  pack                             -> exp/<tag>/*.zip
  9  upload (dry run unless --skip_upload false)
Runs with other teachers, quantizers, numbers of codebooks or domains of their codes do not
overwrite each other: these are in the names, such as exp/teachers/speech_wavlm_large/mvq16
and dump/codes/train/speech_wavlm_large_mvq16_speech-audio.scp.

General
  --stage N, --stop_stage N   first and last stage                  [1, 9]
  --nj N                      parallel jobs on CPUs                 [number of CPUs]
                              In stages 5 and 7 the processes of a machine, one a GPU,
                              share so many threads; in stage 7 OMP_NUM_THREADS of the
                              environment goes before.
  --ngpu N                    GPUs, on each machine; stage 7 takes fewer if a batch holds too
                              few of the longest pieces for them    [all visible]
  --num_nodes N               machines for training, by Slurm (see cmd.sh)   [1]
  --num_jobs N                jobs of an array in stages 2 and 5, each with --nj processes
                              or --ngpu GPUs; with Slurm on as many machines [1]
  --datadir, --dumpdir, --expdir, --downloads   folders             [data dump exp downloads]
  --dry_run true|false        true runs nothing and lists the commands of each stage,
                              what they read and write, and what would be skipped; with
                              data of your own also pieces, hours, files, disk and steps,
                              for which their lists and lengths are read    [false]

Data (stage 1); without own data the embedded default is fetched (104 MB)
  --data_config F             corpora by name and weight, such as
                              conf/data/librispeech_esc50.yaml; their folders: db.sh
  --speech_dirs \"A B\"         own folders of speech; any folder of audio files, or
  --audio_dirs \"C D\"          Kaldi data directories; the same for general audio
                              (label=PATH names one; quote a path with spaces inside)
  --speech_langs \"en ...\"     languages of the embedded default     [en es fr it ru]
  --audio_sets \"ufoai ...\"    its general audio                     [ufoai sonicpi moh]
                              (of either nothing if no teacher is trained on it)
  --valid_fraction X          part of the recordings held out       [0.025]
  --max_valid_hours X         of each domain at most; the others are trained on [5]
  --max_piece_seconds X       recordings that are longer by a fifteenth are cut, in both
                              sets     [10; students base, large and xlarge: 30]
  --max_hours_speech X, --max_hours_audio X     use only a part     [inf]
  --max_utts N                utterances per set, for smoke runs    [0: all]

Format and filter (stages 2, 3)
  --audio_format flac|wav|flac.ark|wav.ark      .ark: many utterances a file [flac]
  --strict true|false         true skips recordings whose headers tell another length than
                              is there, which are noted otherwise  [false]
  --min_seconds X, --max_seconds X              others are skipped
                                       [0.5, 30; base, large and xlarge: 0.9, 32]
  --min_peak_db X             quieter is silence (dB of full scale) [-60]

Student and teachers (stages 4 to 7)
  --student S                 mini, base, large, xlarge, or any size that the training
                              configuration may have                [of the configuration]
  --teachers \"NAME=F ...\"     F: YAML or its stem in conf/teachers; the training
                              configuration has NAME in its tables
                              [mini: speech=whisper_tiny_en audio=yamnet;
                              others: speech=wavlm_large audio=dasheng_1.2b]
  --train_config F            [by student and teachers
                              conf/train_spear_{mini,base,large,xlarge}_{speech,audio,speech_audio}.yaml]
                              Its tables say how many codebooks each teacher has and
                              which domains it tokenizes: those its loss has a weight in.
  --config_override \"K=V ...\"  changes of it, such as \"optim_conf.lr=0.02 max_epoch=3\"
  --quantizer K               mvq, kmeans (one codebook), rvq or random  [mvq]
  --quantizer_frames N        embeddings to train a quantizer on [as the teacher's YAML]
  --quantizer_data \"T=DIR ...\"  data directories (16 kHz, with utt2num_samples) whose
                              audio the quantizer of a teacher is trained on, such as
                              \"speech=dump_libri/raw/train\"
                              [dump/raw/train, in the teacher's domain]
  --quantizer_iters N         steps in each of the two phases, mvq only [as the teacher's YAML]
  --quantizer_args \"...\"      further options of mvq_train, such as \"--batch_frames 128\"
  --quantizer_tag NAME        added to the names of quantizers, their embeddings and codes;
                              without it, one that exists is not made again in another way
  --teacher_dtype T           of the teachers' computation: float32, bfloat16 or float16;
                              the share of codes as in float32 is told   [float32]
  --min_agreement X           with a smaller share nothing is tokenized  [0.5]
  --shard_seconds N           audio in a shard of stage 5, which a killed job does again
                                     [600, or more so that there are at most 10000]
  --tokenize_domains D        needed: those in which a teacher's loss has a weight; all: all
                              domains of the data, so that runs with other loss_weights
                              find their codes                      [needed]
  --one_pass true|false       true tokenizes with all teachers in one pass over the audio;
                              a change of one then repeats the others    [false]

Pre-training, packing, upload (stages 7 to 9)
  --train_args \"...\"          further options of spear_train, such as \"--max_epoch 5\"
  --tag TAG                   name in exp/                          [from the configuration]
  --inference_model NAME      what is packed                        [valid.loss.best.pth]
  --pack_args \"...\"           further options of spear_pack, for the model card, such as
                              \"--results RESULTS.md --language en --license cc-by-4.0\"
  --hf_repo USER/NAME         where stage 9 uploads to
  --skip_upload true|false    true only lists what would be sent    [true]"

stage=1
stop_stage=9
nj=$(env -u OMP_NUM_THREADS nproc) # which obeys path.sh's 1
ngpu=
num_nodes=1
num_jobs=1
datadir=data
dumpdir=dump
expdir=exp
downloads=${DOWNLOADS}
dry_run=false

data_config=
speech_dirs=${SPEECH_DIRS}
audio_dirs=${AUDIO_DIRS}
speech_langs=
audio_sets=
valid_fraction=0.025
max_valid_hours=5
max_piece_seconds=
max_hours_speech=inf
max_hours_audio=inf
max_utts=0

audio_format=flac
strict=false
min_seconds=
max_seconds=
min_peak_db=-60

student=
teachers=
train_config=
config_override=
quantizer=mvq
quantizer_frames=
quantizer_data=
quantizer_iters=
quantizer_args=
quantizer_tag=
teacher_dtype=float32
min_agreement=0.5
shard_seconds=
tokenize_domains=needed
one_pass=false

train_args=
tag=
inference_model=valid.loss.best.pth
pack_args=
hf_repo=
skip_upload=true

. ../ssl1/local/recipe.sh
fs=16000 # Hz; the teachers and the student expect it

# runner <gpus> <threads> <log> [options]: words for step --runner
runner() { echo "${cuda_cmd} --gpu $1 --num_threads $2 ${4:-} $(quoted "$3")"; }

# share_out <command of cmd.sh> <gpus> <cores> <log with JOB> <threads>: sets shared, options
# of step by which jobs do a share each, before its own command puts them together
share_out() {
    shared=()
    [ "${num_jobs}" -gt 1 ] || return 0
    shared=(--jobs "${num_jobs}" --array_runner "$1 --gpu $2 --num_threads $3 \
        JOB=1:${num_jobs} $(quoted "$4") env OMP_NUM_THREADS=$5")
}

# show_end <log>: its last line
show_end() { [ "${dry_run}" = true ] || tail -n 1 "$1"; }

# plan <options of local/plan.py>: sets train_config, tag, heard (domains), seconds of
# utterances that were not given, most_gpus, and arrays with an entry a teacher
plan() {
    local assignments
    assignments=$(python local/plan.py --student "${student}" \
        --train_config "${given_config}" --teachers "${teachers}" --tag "${tag}" \
        --quantizer "${quantizer}" --quantizer_iters "${quantizer_iters}" \
        --quantizer_frames "${quantizer_frames}" --quantizer_tag "${quantizer_tag}" \
        --quantizer_data "${quantizer_data}" --quantizer_args "${quantizer_args}" \
        --tokenize_domains "${tokenize_domains}" --config_override "${config_override}" \
        --min_seconds "${min_seconds}" --max_seconds "${max_seconds}" \
        --max_piece_seconds "${max_piece_seconds}" --min_peak_db="${min_peak_db}" \
        --valid_fraction "${valid_fraction}" --max_valid_hours "${max_valid_hours}" \
        --max_hours_speech "${max_hours_speech}" --max_hours_audio "${max_hours_audio}" \
        --max_utts "${max_utts}" --audio_format "${audio_format}" \
        --teacher_dtype "${teacher_dtype}" --min_agreement "${min_agreement}" \
        --shard_seconds "${shard_seconds}" \
        "--train_args=${train_args}" --expdir "${expdir}" --dumpdir "${dumpdir}" "$@")
    eval "${assignments}"
}
given_config=${train_config}
names=() yamls=() domains=() quantizer_domains=() weights=() mvq_options=()
quantizer_dirs=() folders=() quantizers=() codes=()
heard='' most_gpus=''
# Before hours are spent on data: do the options fit, are the teachers there?
opts=(--begin)
[ "${stage}" -gt 3 ] || opts+=(--new_data)
if wanted 4 && [ "${dry_run}" = false ]; then opts+=(--check_teachers); fi
if wanted 7; then
    opts+=("--check_training=${train_args}" --inference_model "${inference_model}")
fi
if wanted 8 && [ -n "${pack_args}" ]; then opts+=("--check_packing=${pack_args}"); fi
[ "${dry_run}" = false ] || opts+=(--dry_run)
plan "${opts[@]}"
if wanted 7 && [ -n "${most_gpus}" ] && [ "${num_nodes}" -gt "${most_gpus}" ]; then
    log "ERROR: --num_nodes ${num_nodes}: a batch (batch_bins) holds only ${most_gpus} of the longest pieces; use fewer, or a larger batch by --config_override batch_bins=N"
    exit 1
fi
# Of the embedded data what a teacher is trained on.
[[ ,${heard}, != *,speech,* ]] || speech_langs=${speech_langs:-en es fr it ru}
[[ ,${heard}, != *,audio,* ]] || audio_sets=${audio_sets:-ufoai sonicpi moh}
exp=${expdir}/${tag}

# show_figures <summary of stage 1>: what is to do, before hours are spent on it
show_figures() {
    [ -e "$1" ] || return 0
    log "What there is to do:"
    plan --new_data --summary "$1"
}

if wanted 1; then
    log "Stage 1: data preparation"
    lock "${datadir}"
    inputs=(--source_dirs "${speech_dirs}" --source_dirs "${audio_dirs}")
    if [ -n "${data_config}" ]; then
        inputs+=(--input "${data_config}")
        roots=$(python local/data_corpora.py --config "${data_config}" --roots)
        while read -r root; do
            [ -z "${root}" ] || inputs+=(--source "${root}")
        done <<<"${roots}"
    fi
    # Of the embedded default: what is held out of training.
    [ -n "${data_config}${speech_dirs}${audio_dirs}" ] ||
        inputs+=(--input local/held_out.txt)
    command=(local/data.sh --data_config "${data_config}"
        --speech_dirs "${speech_dirs}" --audio_dirs "${audio_dirs}"
        --downloads "${downloads}" --speech_langs "${speech_langs}"
        --audio_sets "${audio_sets}" --valid_fraction "${valid_fraction}"
        --max_valid_hours "${max_valid_hours}" --max_seconds "${max_seconds}"
        --max_piece_seconds "${max_piece_seconds}" --max_utts "${max_utts}"
        --max_hours_speech "${max_hours_speech}" --max_hours_audio "${max_hours_audio}")
    options=(--mark "${datadir}/.done.json" "${inputs[@]}" --output "${datadir}/sets"
        --output "${datadir}/train/wav.scp" --output "${datadir}/valid/wav.scp"
        -- "${command[@]}" --datadir "${datadir}" + --nj "${nj}")
    told=
    if [ "${dry_run}" = true ]; then
        told=$(step "${options[@]}")
        echo "${told}"
    else
        step "${options[@]}"
    fi
    unlock
    if [[ ${told} == *"would run: "* && -n ${data_config}${speech_dirs}${audio_dirs} ]]; then
        log "reading lists and lengths as stage 1 will, into a temporary folder"
        scratch=$(mktemp -d)
        trap 'rm -rf "${scratch}"' EXIT
        "${command[@]}" --datadir "${scratch}" --nj "${nj}" >"${scratch}/log" 2>&1 ||
            log "nothing is known of the data yet: $(tail -n 1 "${scratch}/log")"
        show_figures "${scratch}/summary.json"
    else
        show_figures "${datadir}/summary.json"
    fi
fi

if wanted 2 || wanted 3; then
    sets="train valid"
    if grep -qs '"finished"' "${datadir}/.done.json" && [ -e "${datadir}/sets" ]; then
        sets=$(<"${datadir}/sets")
    elif [ "${dry_run}" = false ]; then
        log "ERROR: ${datadir} has not been prepared; run stage 1 first"
        exit 1
    fi
    lock "${dumpdir}/raw"
fi

if wanted 2; then
    log "Stage 2: format to ${fs} Hz mono ${audio_format}"
    strict_words=()
    [ "${strict}" = false ] || strict_words=(--strict)
    for set in ${sets}; do
        out=${dumpdir}/raw/org/${set}
        share_out "${train_cmd}" 0 "${nj}" "${out}/log/format.JOB.log" 1
        # The mark of stage 1 changes when audio files did.
        step --mark "${out}/.done.json" "${shared[@]}" --input "${datadir}/${set}" \
            --input "${datadir}/.done.json" --output "${out}/wav.scp" \
            -- python -m espnet2_spear.bin.spear_format --in_dir "${datadir}/${set}" \
            --out_dir "${out}" --audio_format "${audio_format}" --fs "${fs}" \
            "${strict_words[@]}" + --nj "${nj}"
    done
fi

if wanted 3; then
    log "Stage 3: filter by length and level"
    for set in ${sets}; do
        out=${dumpdir}/raw/${set}
        step --mark "${out}/.done.json" --input "${dumpdir}/raw/org/${set}" \
            --output "${out}/wav.scp" --output "${out}/feats_type" \
            -- python -m espnet2_spear.bin.spear_filter \
            --in_dir "${dumpdir}/raw/org/${set}" --out_dir "${out}" --fs "${fs}" \
            --min_seconds "${min_seconds}" --max_seconds "${max_seconds}" \
            --min_peak_db "${min_peak_db}"
    done
fi
if wanted 2 || wanted 3; then unlock; fi

[ "${stop_stage}" -lt 4 ] || count_gpus

# train_quantizer <number of the teacher> <threads> <GPU, or nothing>
train_quantizer() {
    local name=${names[$1]} dir=${folders[$1]} out=${quantizers[$1]} device=cpu gpus=0
    local raw=${quantizer_dirs[$1]} kinds=()
    if [ -e "${out}/quantizer.pt" ] && [ ! -e "${out}/train.json" ]; then
        log "${out}/quantizer.pt: nothing tells how it was made; it is used as it is"
        return
    fi
    if [ -z "${raw}" ]; then # those of the pre-training
        raw=${dumpdir}/raw/train
        kinds=(--domains "${quantizer_domains[$1]}")
    fi
    if [ -n "$3" ]; then
        gpus=1 device=cuda
        # A cluster gives every job a GPU; here all jobs see the same ones.
        [ "${cmd_backend:-}" != local ] || device=cuda:$3
    fi
    local remedy="give --quantizer_tag NAME to make another beside it, or remove ${dir}"
    log "teacher '${name}': embeddings, log in ${dir}/embed.log"
    step --mark "${dir}/embed.json" --input "${yamls[$1]}" \
        ${weights[$1]:+--input "${weights[$1]}"} --input "${raw}/wav.scp" \
        --input "${raw}/utt2num_samples" ${kinds:+--input "${raw}/utt2domain"} \
        --output "${dir}/embeddings/embeddings.json" --refuse "${remedy}" \
        --runner "$(runner "${gpus}" "$2" "${dir}/embed.log")" \
        -- python -m espnet2_spear.bin.spear_embed --teacher_config "${yamls[$1]}" \
        --wav_scp "${raw}/wav.scp" "${kinds[@]}" \
        ${quantizer_frames:+--max_frames "${quantizer_frames}"} \
        --output_dir "${dir}/embeddings" \
        --compute_dtype "${teacher_dtype}" + --device "${device}" --num_threads "$2"
    log "teacher '${name}': quantizer ${out##*/}, log in ${out}/train.log"
    # shellcheck disable=SC2086
    step --mark "${out}/train.json" --input "${dir}/embeddings/embeddings.json" \
        --output "${out}/quantizer.pt" --refuse "${remedy}" \
        --runner "$(runner "${gpus}" "$2" "${out}/train.log")" \
        -- python -m espnet2_spear.bin.mvq_train --embeddings "${dir}/embeddings" \
        --output "${out}/quantizer.pt" ${mvq_options[$1]} \
        + --device "${device}" --num_threads "$2"
    [ ! -e "${out}/train.log" ] || show_end "${out}/train.log"
}

# train_lane <first> <lanes>: that teacher and every <lanes>-th after it, one by one, on a
# GPU of their own or on their share of the CPUs
train_lane() {
    local i gpu=
    [ "${ngpu}" -eq 0 ] || gpu=$1
    for ((i = $1; i < ${#names[@]}; i += $2)); do
        train_quantizer "${i}" "$(((nj + $2 - 1) / $2))" "${gpu}"
    done
}

# train_lanes <lanes>: all at once
train_lanes() {
    local groups=() group lane failed=0
    set -m # a process group each, so that an interruption reaches all of it
    for ((lane = 0; lane < $1; lane++)); do
        train_lane "${lane}" "$1" &
        groups+=("$!")
    done
    set +m
    trap 'trap - INT TERM; kill -- "${groups[@]/#/-}" 2>/dev/null; exit 143' INT TERM
    for group in "${groups[@]}"; do wait "${group}" || failed=1; done
    trap - INT TERM
    [ "${failed}" -eq 0 ] || exit 1
}

if wanted 4; then
    log "Stage 4: embeddings and quantizer training"
    # The data are known now.
    if wanted 3 && [ "${dry_run}" = false ]; then plan; fi
    lock "${expdir}/teachers"
    lanes=${#names[@]}
    [ "${ngpu}" -eq 0 ] || [ "${ngpu}" -ge "${lanes}" ] || lanes=${ngpu}
    if [ "${lanes}" -gt 1 ] && [ "${dry_run}" = false ]; then
        train_lanes "${lanes}"
    else
        for ((lane = 0; lane < lanes; lane++)); do train_lane "${lane}" "${lanes}"; done
    fi
    [ "${dry_run}" = true ] || plan --check_quantizers
    unlock
fi

joined() { (IFS=+ && echo "$*"); }

# tokenize <set> <numbers of teachers>: in one pass over the audio
tokenize() {
    local set=$1 i raw=${dumpdir}/raw/$1 out=${dumpdir}/codes/$1 label joblog inputs=()
    local outputs=() configs=() files=() stems=() kinds=() jobs threads
    shift
    # A process a GPU, or a CPU; they share the cores.
    jobs=$((ngpu > 0 ? ngpu : nj))
    threads=$((nj > jobs ? nj / jobs : 1))
    for i in "$@"; do
        stems+=("${codes[i]}")
        configs+=("${yamls[i]}")
        files+=("${quantizers[i]}/quantizer.pt")
        kinds+=("${domains[i]}")
        inputs+=(--input "${yamls[i]}" --input "${quantizers[i]}/quantizer.pt")
        [ -z "${weights[i]}" ] || inputs+=(--input "${weights[i]}")
        outputs+=(--output "${out}/${codes[i]}.scp" --output "${out}/${codes[i]}.json")
    done
    label=$(joined "${stems[@]}")
    joblog=${out}/log/${label}.log
    log "${label}, set ${set}: tokenization, log in ${joblog}"
    share_out "${cuda_cmd}" "${ngpu}" "${nj}" "${joblog%.log}.JOB.log" "${threads}"
    step --mark "${out}/${label}.step.json" --adopt "${shared[@]}" "${inputs[@]}" \
        --input "${raw}/wav.scp" --input "${raw}/utt2num_samples" \
        --input "${raw}/utt2domain" "${outputs[@]}" \
        --runner "$(runner "${ngpu}" "${nj}" "${joblog}") env OMP_NUM_THREADS=${threads}" \
        -- python -m espnet2_spear.bin.spear_tokenize --teacher_config "${configs[@]}" \
        --quantizer "${files[@]}" --domains "${kinds[@]}" --name "${stems[@]}" \
        --data_dir "${raw}" --output_dir "${out}" --dtype "${teacher_dtype}" \
        ${shard_seconds:+--shard_seconds "${shard_seconds}"} \
        + --nj "${jobs}" --ngpu "${ngpu}" --num_threads "${threads}" \
        --min_agreement "${min_agreement}"
    [ ! -e "${joblog}" ] || show_end "${joblog}"
}

if wanted 5; then
    log "Stage 5: tokenization"
    lock "${dumpdir}/codes"
    for set in train valid; do
        if [ "${one_pass}" = true ]; then
            tokenize "${set}" "${!names[@]}"
        else
            for i in "${!names[@]}"; do tokenize "${set}" "${i}"; done
        fi
    done
    unlock
fi

if wanted 6; then
    log "Stage 6: checks of codes against audio"
    lock "${dumpdir}/codes"
    for set in train valid; do
        for i in "${!names[@]}"; do
            stem=${dumpdir}/codes/${set}/${codes[i]}
            step --mark "${stem}.check.json" --input "${dumpdir}/raw/${set}" \
                --input "${stem}.scp" --input "${stem}.json" \
                --output "${stem}.check/codes_check.json" \
                -- python -m espnet2_spear.bin.spear_check_codes \
                --data_dir "${dumpdir}/raw/${set}" --output_dir "${stem}.check" \
                --codes "${codes[i]}=${stem}.scp" --domains "${codes[i]}=${domains[i]}"
        done
    done
    unlock
fi

packed=${exp}/${tag}_${inference_model%.pth}.zip
if wanted 7 || wanted 8; then lock "${exp}"; fi

if wanted 7; then
    log "Stage 7: pre-training, log in ${exp}/train.log"
    [ "${dry_run}" = true ] || plan --write "${exp}/train.yaml"
    opts=() inputs=()
    for part in train valid; do
        raw=${dumpdir}/raw/${part}
        inputs+=(--input "${raw}")
        opts+=("--${part}_data_path_and_name_and_type" "${raw}/wav.scp,speech,sound"
            "--${part}_data_path_and_name_and_type" "${raw}/utt2domain,domain,text"
            "--${part}_shape_file" "${raw}/utt2num_samples")
        for i in "${!names[@]}"; do
            scp=${dumpdir}/codes/${part}/${codes[i]}.scp
            inputs+=(--input "${scp}")
            opts+=("--${part}_data_path_and_name_and_type"
                "${scp},codes_${names[i]},kaldi_ark")
        done
    done
    if [ -e "${datadir}/local/weights" ]; then
        inputs+=(--input "${datadir}/local/weights")
        while read -r corpus weight; do
            opts+=(--sampler_conf "corpus_weights.${corpus}=${weight}")
        done <"${datadir}/local/weights"
    fi
    nodes=()
    if [ "${num_nodes}" -gt 1 ]; then
        nodes=(--dist_launcher slurm --dist_init_method "file://$(realpath -m "${exp}")/.dist_init.$$.$(date +%s)")
    fi
    train_gpus=${ngpu} # of this machine
    if [ -n "${most_gpus}" ] && [ $((ngpu * num_nodes)) -gt "${most_gpus}" ]; then
        # With whole utterances for each, and the same number on all machines.
        train_gpus=$((most_gpus / num_nodes))
        log "uses ${train_gpus} of ${ngpu} GPUs: a batch (batch_bins) holds only ${most_gpus} of the longest pieces; --config_override batch_bins=N makes it larger"
    fi
    # The processes of a machine, one a GPU, share its cores.
    ranks=$((train_gpus > 1 ? train_gpus : 1))
    threads=${user_threads:-$((nj > ranks ? nj / ranks : 1))}
    runner="$(runner "${train_gpus}" "${nj}" "${exp}/train.log" "--num_nodes ${num_nodes}")"
    # shellcheck disable=SC2086
    step --mark "${exp}/train.json" --input "${exp}/train.yaml" "${inputs[@]}" \
        --output "${exp}/${inference_model}" \
        --again "goes on from its last checkpoint (another --tag starts anew)" \
        --runner "${runner} env OMP_NUM_THREADS=${threads}" \
        -- python -m espnet2_spear.bin.spear_train --config "${exp}/train.yaml" \
        --output_dir "${exp}" "${opts[@]}" ${train_args} \
        + --ngpu "${train_gpus}" --resume true --multiprocessing_distributed true "${nodes[@]}"
    if [ "${dry_run}" = false ] && [ -e "${exp}/train.log" ]; then
        # A training that had nothing left to do logs no results.
        { grep "results:" "${exp}/train.log" || true; } | tail -n 1 | cut -c 1-400
    fi
fi

if wanted 8; then
    log "Stage 8: pack -> ${packed}"
    options=() inputs=()
    if [ -d "${exp}/images" ]; then
        options+=("${exp}/images") inputs+=(--input "${exp}/images")
    fi
    for word in ${pack_args}; do # such as the file of --results
        [ ! -f "${word#*=}" ] || inputs+=(--input "${word#*=}")
    done
    if [ "${dry_run}" = false ]; then
        if [ ! -e "${exp}/${inference_model}" ]; then
            log "ERROR: ${exp}/${inference_model} is missing; run stage 7 first"
            exit 1
        fi
        # The link is resolved to the epoch that it stands for.
        cp -L "${exp}/${inference_model}" "${exp}/packed.pth"
    fi
    # shellcheck disable=SC2086
    step --mark "${exp}/pack.json" --input "${exp}/config.yaml" \
        --input "${exp}/${inference_model}" "${inputs[@]}" --output "${packed}" \
        -- python -m espnet2_spear.bin.spear_pack --train_config "${exp}/config.yaml" \
        --model_file "${exp}/packed.pth" --outpath "${packed}" \
        --option "${options[@]}" ${pack_args}
fi
if wanted 7 || wanted 8; then unlock; fi

if wanted 9; then
    log "Stage 9: upload"
    command=(python -m espnet2_spear.bin.spear_upload --packed "${packed}"
        --repo_id "${hf_repo:-user/${tag}}" --dry_run "${skip_upload}")
    if [ "${dry_run}" = true ]; then echo "  $ ${command[*]}"; else "${command[@]}"; fi
fi

log "Finished stages ${stage} to ${stop_stage} in $((SECONDS - start_seconds)) s"

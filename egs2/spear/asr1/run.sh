#!/usr/bin/env bash
# A recognizer on top of a pre-trained SPEAR student, or without one. See --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

log() { echo "$(date '+%Y-%m-%dT%H:%M:%S') (run.sh) $*"; }
start_seconds=${SECONDS}

. ./path.sh
. ./cmd.sh
. ./db.sh

help_message="Usage: ./run.sh [--stage 1] [--stop_stage 7] [options]

Stages. What is finished is done again only if its inputs or options changed; then, and
when it is skipped, that is said. A training is never repeated: it wants another --asr_tag.
  1  data: check and link 16 kHz sets    -> dump/raw/<set>
  2  token list                          -> data/token_list/{char,bpe_unigram<N>}
  3  training                            -> exp/asr_<tag>
  4  decoding                            -> exp/asr_<tag>/<decode>/<set>
  5  scoring: WER, CER                   -> exp/asr_<tag>/{RESULTS.md,score.json}
  6  pack                                -> exp/asr_<tag>/packed.zip
  7  proof: unpack elsewhere and decode  -> a temporary folder

  --stage N, --stop_stage N      first and last stage          [1, 7]
  --ngpu N                       GPUs for training, a process each, on each machine [all visible]
  --num_nodes N                  machines for training, by Slurm (see cmd.sh) [1]
  --gpu_inference true|false     decode on a GPU               [false]
  --search greedy|beam           best path, or ESPnet's prefix search, slow on CPUs [greedy]
  --prepare \"SET=CORPUS:PART,PART ...\"  sets from the corpora of ../ssl1/db.sh, such as
                                 \"train_100=librispeech:train-clean-100\"
  --partial true|false           accept less of a corpus than was published [false]
  --nj N                         processes to format them with; cores of a training's
                                 machine (--cpus-per-task)     [number of CPUs]
  --asr_config FILE              training configuration        [conf/train_asr_spear_frozen.yaml]
  --asr_args \"...\"               further options of asr_train  []
  --asr_tag TAG                  name of the recognizer        [<config>_<token type>_s<seed>]
  --seed N                       seed of training              [0]
  --ckpt PATH                    pre-trained student, for frontend: spear (a folder or
                                 file that load_model opens) or encoder: zipformer (a .pth file)
  --token_type char|bpe          kind of tokens                [char]
  --nbpe N                       size of the bpe vocabulary    [100]
  --inference_config FILE        decoding configuration        [conf/decode_asr_ctc.yaml] (beam)
  --inference_asr_model NAME     model file to decode with     [valid.cer_ctc.ave.pth]
  --train_set, --valid_set, --test_sets \"A B\"   sets           [en_train, en_dev, en_dev en_test]
  --datadir, --dumpdir, --expdir folders                       [data dump exp]
  --python CMD                   Python that knows the plugin  [python -m espnet2_spear.launcher]
  --dry_run true|false           true runs nothing and lists the commands of each stage,
                                 what they read and write, and what would be skipped [false]"

stage=1
stop_stage=7
ngpu=
num_nodes=1
gpu_inference=false
prepare=
partial=false
nj=$(env -u OMP_NUM_THREADS nproc) # which obeys path.sh's 1
asr_config=conf/train_asr_spear_frozen.yaml
asr_args=
asr_tag=
seed=0
ckpt=
token_type=char
nbpe=100
search=greedy
inference_config=conf/decode_asr_ctc.yaml
inference_asr_model=valid.cer_ctc.ave.pth
train_set=en_train
valid_set=en_dev
test_sets="en_dev en_test"
datadir=data
dumpdir=dump
expdir=exp
python="python -m espnet2_spear.launcher"
dry_run=false

. ../ssl1/local/recipe.sh

# Where ESPnet's asr.sh looks for them.
case ${token_type} in
char) token_dir=${datadir}/token_list/char bpemodel= ;;
bpe) token_dir=${datadir}/token_list/bpe_unigram${nbpe} bpemodel=${token_dir}/bpe.model ;;
*)
    log "ERROR: --token_type must be char or bpe, not '${token_type}'"
    exit 2
    ;;
esac
if [ ! -e "${asr_config}" ]; then
    log "ERROR: ${asr_config}: no such configuration; conf/ has $(echo conf/train_asr_*.yaml)"
    exit 1
fi
config_name=$(basename "${asr_config}" .yaml)
system=${config_name#train_asr_}
: "${asr_tag:=${system}_${token_type}_s${seed}}"
asr_exp=${expdir}/asr_${asr_tag}
case ${search} in
greedy) decode_dir=${asr_exp}/decode_ctc_greedy ;;
beam) decode_dir=${asr_exp}/$(basename "${inference_config}" .yaml) ;;
*)
    log "ERROR: --search must be greedy or beam, not '${search}'"
    exit 2
    ;;
esac
all_sets=$(tr ' ' '\n' <<<"${train_set} ${valid_set} ${test_sets}" | sort -u)

need() { # need <file> <stage that makes it>
    if [ "${dry_run}" = false ] && [ ! -e "$1" ]; then
        log "ERROR: $1 is missing; run stage $2 first"
        exit 1
    fi
}

sound_type() { # sound_type <set>: as what ESPnet reads its audio, which data.py checked
    local first=
    [ ! -e "$1/wav.scp" ] || read -r first <"$1/wav.scp" || true
    if [[ ${first} =~ \.ark:[0-9]+$ ]]; then echo kaldi_ark; else echo sound; fi
}

# What would stop a later stage stops the run here.
if wanted 4 && [ "${search}" = beam ] && [ ! -e "${inference_config}" ]; then
    log "ERROR: --inference_config ${inference_config}: no such file"
    exit 1
fi
if wanted 3 && [ "${dry_run}" = false ] && grep -Eq '^decoder: *transducer' "${asr_config}"; then
    ${python} -m espnet2_spear.asr.transducer_loss
fi
task_args=(--use_preprocessor true --token_type "${token_type}"
    --token_list "${token_dir}/tokens.txt" --non_linguistic_symbols none
    --cleaner none --g2p none)
student=() student_args=()

# names <part> <class>: does the configuration say so?
names() { grep -Eq "^$1: *[\"']?$2[\"']? *(#.*)?\$" "${asr_config}"; }

if wanted 3; then
    stand_in=()
    if names frontend spear; then
        if [ -z "${ckpt}" ] && ! grep -Eq '^ +ckpt: *[^ #]' "${asr_config}"; then
            log "ERROR: ${asr_config} has frontend: spear; name the student with --ckpt" >&2
            exit 1
        fi
        if [ -n "${ckpt}" ]; then
            if [ ! -e "${ckpt}" ] && [ "${dry_run}" = false ]; then
                log "ERROR: --ckpt ${ckpt}: no such file or folder; pre-train with ../ssl1" >&2
                exit 1
            fi
            student_args+=(--frontend_conf "ckpt=${ckpt}")
            stand_in=(--frontend_conf arch=base)
            student=("${ckpt}")
        fi
    fi
    if names encoder zipformer && [ -n "${ckpt}" ]; then
        if [ ! -f "${ckpt}" ] && [ "${dry_run}" = false ]; then
            log "ERROR: --ckpt ${ckpt}: must be the file of a student; a folder in another layout becomes one by python -m espnet2_spear.bin.spear_import" >&2
            exit 1
        fi
        student_args+=(--init_param "${ckpt}:student:encoder" --encoder_conf "arch.name=${ckpt}")
        student=("${ckpt}")
    fi
    check=("${student_args[@]}")
    # In a dry run the student may be yet to be pre-trained.
    [ -z "${ckpt}" ] || [ -e "${ckpt}" ] || check=("${stand_in[@]}")
    # shellcheck disable=SC2086
    check_training asr "${inference_asr_model}" "${asr_exp}" --config "${asr_config}" \
        "${task_args[@]}" "${check[@]}" ${asr_args}
fi

if wanted 1; then
    log "Stage 1: data"
    lock "${dumpdir}/raw"
    for item in ${prepare}; do
        set=${item%%=*} corpus=${item#*=}
        if [[ ! ${item} =~ ^[^=:]+=[^=:]+:[^=:]+$ ]] ||
            [ ! -e "../ssl1/local/data_${corpus%%:*}.py" ]; then
            log "ERROR: --prepare '${item}': must be SET=CORPUS:PART,PART with a corpus of ../ssl1/local/data_corpora.py --list"
            exit 2
        fi
        prepare_corpus "${set}" "${corpus%%:*}" "${corpus#*:}" \
            --min_seconds 0.3 --max_seconds 40 --min_peak_db -60
    done
    for set in ${all_sets}; do
        [[ " ${prepare//$'\n'/ } " != *" ${set}="* ]] || continue
        # Where there is none, data.py says what to do.
        input=()
        if [ "${dry_run}" = true ] || [ -e "${SSL_DATA}/${set}" ]; then
            input=(--input "${SSL_DATA}/${set}")
        fi
        raw=${dumpdir}/raw/${set}
        step --mark "${raw}/.done.json" "${input[@]}" --output "${raw}/wav.scp" \
            --output "${raw}/feats_type" -- python local/data.py \
            --in_dir "${SSL_DATA}/${set}" --root "${SSL_ROOT}" --out_dir "${raw}"
    done
    unlock
fi

if wanted 2; then
    log "Stage 2: token list -> ${token_dir}/tokens.txt"
    text=${dumpdir}/raw/${train_set}/text
    need "${text}" 1
    lock "${token_dir}"
    outputs=(--output "${token_dir}/tokens.txt")
    if [ "${token_type}" = bpe ]; then
        outputs+=(--output "${bpemodel}")
        command=(python local/tokens.py --text "${text}" --train "${token_dir}/bpe"
            --nbpe "${nbpe}")
    else
        command=(python -m espnet2.bin.tokenize_text --token_type char --field 2-
            --input "${text}" --output "${token_dir}/tokens.txt"
            --write_vocabulary true --add_symbol "<blank>:0" --add_symbol "<unk>:1"
            --add_symbol "<sos/eos>:-1")
    fi
    step --mark "${token_dir}/tokens.json" --input "${text}" "${outputs[@]}" \
        -- "${command[@]}"
    for set in $(tr ' ' '\n' <<<"${train_set} ${valid_set}" | sort -u); do
        text=${dumpdir}/raw/${set}/text shape=${token_dir}/text_shape.${set}
        need "${text}" 1
        step --mark "${shape}.json" --input "${text}" \
            ${bpemodel:+--input "${bpemodel}"} --output "${shape}" \
            -- python local/tokens.py --text "${text}" --shape "${shape}" \
            --bpemodel "${bpemodel}"
    done
    unlock
fi

if [ "${stage}" -le 6 ] && [ "${stop_stage}" -ge 3 ]; then lock "${asr_exp}"; fi

if wanted 3; then
    log "Stage 3: training -> ${asr_exp}"
    need "${token_dir}/tokens.txt" 2
    need "${dumpdir}/raw/${valid_set}/wav.scp" 1
    inputs=(--input "${asr_config}" --input "${token_dir}/tokens.txt")
    args=("${task_args[@]}")
    [ -z "${bpemodel}" ] || args+=(--bpemodel "${bpemodel}")
    for part in train valid; do
        set=${part}_set
        set=${!set}
        dir=${dumpdir}/raw/${set}
        inputs+=(--input "${dir}" --input "${token_dir}/text_shape.${set}")
        args+=("--${part}_data_path_and_name_and_type" "${dir}/wav.scp,speech,$(sound_type "${dir}")"
            "--${part}_data_path_and_name_and_type" "${dir}/text,text,text"
            "--${part}_shape_file" "${dir}/utt2num_samples"
            "--${part}_shape_file" "${token_dir}/text_shape.${set}")
    done
    args+=("${student_args[@]}")
    if [ -d "${ckpt}" ] && [ "${#student[@]}" -gt 0 ]; then
        # What a folder of a student may be read from; not its logs, nor what ../ssl1
        # and a training that goes on write there besides.
        mapfile -t student < <(find "${ckpt}" -maxdepth 1 ! -type d \
            -regex '.*\.\(yaml\|json\|pth\|pt\|bin\|safetensors\)' \
            ! -name 'train.*' ! -name 'pack*' ! -name 'checkpoint*' ! -name '*epoch.pth' |
            sort)
    fi
    for file in "${student[@]}"; do inputs+=(--input "${file}"); done
    count_gpus
    launch_options "${asr_exp}"
    # shellcheck disable=SC2086
    step --mark "${asr_exp}/train.json" "${inputs[@]}" --adopt \
        --output "${asr_exp}/${inference_asr_model}" \
        --refuse "give another --asr_tag, or remove ${asr_exp} to train it anew" \
        --again "goes on from its last checkpoint" \
        --runner "$(train_runner "${ngpu}" "${num_nodes}" "${nj}" "${asr_exp}/train.log")" \
        -- ${python} -m espnet2.bin.asr_train "${args[@]}" --config "${asr_config}" \
        --output_dir "${asr_exp}" --seed "${seed}" ${asr_args} \
        + "${launch[@]}"
fi

if wanted 4; then
    need "${asr_exp}/${inference_asr_model}" 3
    gpus=0
    [ "${gpu_inference}" = false ] || gpus=1
    for set in ${test_sets}; do
        log "Stage 4: decoding ${set} -> ${decode_dir}/${set}"
        out=${decode_dir}/${set} raw=${dumpdir}/raw/${set}
        inputs=(--input "${asr_exp}/config.yaml"
            --input "${asr_exp}/${inference_asr_model}" --input "${raw}/wav.scp")
        args=(--output_dir "${out}"
            --data_path_and_name_and_type "${raw}/wav.scp,speech,$(sound_type "${raw}")"
            --asr_train_config "${asr_exp}/config.yaml"
            --asr_model_file "${asr_exp}/${inference_asr_model}")
        program=local/asr_ctc_greedy.py
        if [ "${search}" = beam ]; then
            program="-m espnet2.bin.asr_inference"
            args+=(--config "${inference_config}")
            inputs+=(--input "${inference_config}")
        fi
        # shellcheck disable=SC2086
        step --mark "${out}/decode.json" "${inputs[@]}" --output "${out}/1best_recog/text" \
            --runner "$(train_runner "${gpus}" 1 1 "${out}/decode.log")" \
            -- ${python} ${program} "${args[@]}" + --ngpu "${gpus}"
    done
fi

if wanted 5; then
    log "Stage 5: scoring -> ${asr_exp}/RESULTS.md"
    args=(--exp_dir "${asr_exp}" --system "${system}" --seed "${seed}") inputs=()
    for set in ${test_sets}; do
        text=${dumpdir}/raw/${set}/text found=${decode_dir}/${set}/1best_recog/text
        need "${found}" 4
        inputs+=(--input "${text}" --input "${found}")
        args+=(--score_set "${set}" "${text}" "${found}")
    done
    # shellcheck disable=SC2086
    step --mark "${asr_exp}/score_mark.json" "${inputs[@]}" \
        --output "${asr_exp}/RESULTS.md" --output "${asr_exp}/score.json" \
        --runner "$(train_runner 0 1 1 "${asr_exp}/score.log")" \
        -- ${python} local/asr_score.py "${args[@]}"
    [ "${dry_run}" = true ] || sed -n '/^## asr_/,$p' "${asr_exp}/RESULTS.md"
fi

if wanted 6; then
    log "Stage 6: pack -> ${asr_exp}/packed.zip"
    need "${asr_exp}/${inference_asr_model}" 3
    options=() inputs=(--input "${asr_exp}/config.yaml"
        --input "${asr_exp}/${inference_asr_model}")
    if [ -e "${asr_exp}/RESULTS.md" ]; then
        options=(--results "${asr_exp}/RESULTS.md")
        inputs+=(--input "${asr_exp}/RESULTS.md")
    fi
    # shellcheck disable=SC2086
    step --mark "${asr_exp}/pack.json" "${inputs[@]}" --output "${asr_exp}/packed.zip" \
        -- ${python} -m espnet2_spear.bin.task_pack --task asr --language en \
        --train_config "${asr_exp}/config.yaml" \
        --model_file "${asr_exp}/${inference_asr_model}" \
        --outpath "${asr_exp}/packed.zip" "${options[@]}"
fi
unlock

if wanted 7; then
    log "Stage 7: unpack into another folder and decode there"
    need "${asr_exp}/packed.zip" 6
    scp=${dumpdir}/raw/${test_sets##* }/wav.scp
    # shellcheck disable=SC2206
    command=(${python} local/decode_packed.py --packed "${asr_exp}/packed.zip"
        --forbid "${PWD}" --forbid "$(cd .. && pwd)/ssl1")
    if [ "${dry_run}" = true ]; then
        printf '  $ %s\n' "${command[*]} --wav <the first of ${scp}> --out_dir <temporary>"
        printf '      reads   %s\n' "${asr_exp}/packed.zip" "${scp}"
        echo "      would run: the proof is given each time"
    else
        read -r _ wav <"${scp}"
        "${command[@]}" --wav "${wav}" --out_dir "$(mktemp -d)"
    fi
fi

log "Finished stages ${stage} to ${stop_stage} in $((SECONDS - start_seconds)) s"

#!/usr/bin/env bash
# Fine-tune a student on ESC-50 or AudioSet by ESPnet's cls task. See --help.
# shellcheck source-path=SCRIPTDIR
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

log() { echo "$(date '+%Y-%m-%dT%H:%M:%S') (finetune.sh) $*"; }

. ./path.sh
. ./cmd.sh

help_message="Usage: ./finetune.sh --setting SETTING --ckpt STUDENT.pth [options]

Stages (what is finished is done again only if its inputs or options changed; a training
whose inputs or options changed wants another --tag)
  1  clips, 16 kHz mono, by their corpus in ../ssl1/db.sh  -> dump/raw/<set>
  2  labels, list of classes                               -> dump/raw/<set>/labels
  3  training by espnet2_spear.bin.cls_train               -> exp/cls_<tag>
  4  classification of the test set                        -> exp/cls_<tag>/decode/<set>
  5  accuracy, mAP                                         -> exp/cls_<tag>/RESULTS.md

  --setting S                 esc50: four folds, tested on the fifth;
                              audioset20k: the balanced part, tested on eval;
                              audioset2m: both training parts, tested on eval
  --fold K                    of ESC-50, held out                  [1]
  --ckpt FILE                 pre-trained student, a .pth file
  --config F                  training [conf/train_cls_spear_<setting>.yaml]
  --cls_args \"...\"            further options of cls_train, such as
                              \"--max_epoch 10\"
  --tag TAG                   name in exp/                         [setting and fold]
  --partial true|false        accept less of a corpus than was published [false]
  --inference_model NAME      [valid.total_count.ave.pth]
  --stage N, --stop_stage N   first and last stage                 [1, 5]
  --nj N                      processes of stage 1; in stage 3 the cores of a machine
                              (--cpus-per-task)                    [number of CPUs]
  --ngpu N                    GPUs, a process each, on each machine [all visible]
  --num_nodes N               machines for training, by Slurm (see cmd.sh) [1]
  --datadir, --dumpdir, --expdir   folders                         [data dump exp]
  --python CMD                Python that knows the plugin [python -m espnet2_spear.launcher]
  --dry_run true|false        only list commands, inputs and outputs [false]"

stage=1
stop_stage=5
setting=
fold=1
ckpt=
config=
cls_args=
tag=
partial=false
inference_model=valid.total_count.ave.pth
nj=$(env -u OMP_NUM_THREADS nproc) # which obeys path.sh's 1
ngpu=
num_nodes=1
datadir=data
dumpdir=dump
expdir=exp
python="python -m espnet2_spear.launcher"
dry_run=false
. ../ssl1/local/recipe.sh

case ${setting} in
esc50)
    if [[ ! ${fold} =~ ^[1-5]$ ]]; then
        log "ERROR: --fold must be 1 to 5, not '${fold}'"
        exit 2
    fi
    corpus=esc50 train_parts='' test_parts=fold${fold}
    for i in 1 2 3 4 5; do [ "${i}" = "${fold}" ] || train_parts+=" fold${i}"; done
    suffix=_fold${fold}
    ;;
audioset20k) corpus=audioset train_parts=balanced_train test_parts=eval suffix= ;;
audioset2m)
    corpus=audioset train_parts="balanced_train unbalanced_train" test_parts=eval suffix=
    ;;
*)
    log "ERROR: --setting must be esc50, audioset20k or audioset2m, not '${setting}'"
    exit 2
    ;;
esac
config=${config:-conf/train_cls_spear_${setting}.yaml}
tag=${tag:-${setting}${suffix}}
exp=${expdir}/cls_${tag}
train_set=${setting}${suffix}_train test_set=${corpus}_${test_parts}
tokens=${datadir}/token_list/${setting}${suffix}.txt
if wanted 3 || wanted 4; then count_gpus; fi

# What would stop a later stage stops the run here.
student=()
if wanted 3; then
    if [ ! -f "${ckpt}" ] && { [ "${dry_run}" = false ] || [ -z "${ckpt}" ]; }; then
        log "ERROR: --ckpt '${ckpt}': must be the file of a student; pre-train with ../ssl1, or make one of another layout by python -m espnet2_spear.bin.spear_import"
        exit 1
    fi
    student=(--init_param "${ckpt}:student:encoder" --encoder_conf "arch.name=${ckpt}")
    check=()
    [ ! -f "${ckpt}" ] || check=("${student[@]}")
    # shellcheck disable=SC2086
    check_training cls "${inference_model}" "${exp}" --config "${config}" \
        --token_list "${tokens}" "${check[@]}" ${cls_args}
fi

if wanted 1; then
    log "Stage 1: clips of ${corpus}"
    lock "${dumpdir}/raw"
    for item in "${train_set} ${train_parts}" "${test_set} ${test_parts}"; do
        prepare_corpus "${item%% *}" "${corpus}" "${item#* }" \
            --min_seconds 0.3 --max_seconds inf --min_peak_db -120
    done
    unlock
fi

if wanted 2; then
    log "Stage 2: labels, list of classes"
    for set in ${train_set} ${test_set}; do
        lock "${dumpdir}/raw/${set}"
        opts=(--input "${tokens}" --output "${dumpdir}/raw/${set}/labels"
            --output "${dumpdir}/raw/${set}/text" --)
        words=()
        if [ "${set}" = "${train_set}" ]; then
            opts=(--output "${dumpdir}/raw/${set}/category2utt"
                --output "${dumpdir}/raw/${set}/text" --output "${tokens}" --)
            words=(--train)
        fi
        step --mark "${dumpdir}/raw/${set}/labels.${tag}.json" \
            --input "${dumpdir}/raw/${set}/wav.scp" \
            --input "${datadir}/local/${set}/labels" \
            "${opts[@]}" python local/cls_sets.py --labels "${datadir}/local/${set}/labels" \
            --set_dir "${dumpdir}/raw/${set}" --token_list "${tokens}" "${words[@]}"
    done
    unlock
fi

if [ "${stop_stage}" -ge 3 ]; then lock "${exp}"; fi

if wanted 3; then
    log "Stage 3: training -> ${exp}"
    opts=() inputs=()
    for part in train valid; do
        set=${train_set}
        [ "${part}" = train ] || set=${test_set}
        raw=${dumpdir}/raw/${set}
        inputs+=(--input "${raw}/wav.scp" --input "${raw}/labels")
        opts+=("--${part}_data_path_and_name_and_type" "${raw}/wav.scp,speech,sound"
            "--${part}_data_path_and_name_and_type" "${raw}/labels,label,text"
            "--${part}_shape_file" "${raw}/utt2num_samples")
    done
    launch_options "${exp}"
    # shellcheck disable=SC2086
    step --mark "${exp}/train.json" --input "${config}" --input "${ckpt}" \
        --input "${tokens}" "${inputs[@]}" --output "${exp}/${inference_model}" \
        --refuse "give another --tag, or remove ${exp} to train it anew" \
        --runner "$(train_runner "${ngpu}" "${num_nodes}" "${nj}" "${exp}/train.log")" \
        -- ${python} -m espnet2_spear.bin.cls_train --config "${config}" \
        --output_dir "${exp}" --token_list "${tokens}" \
        "${student[@]}" "${opts[@]}" ${cls_args} \
        + "${launch[@]}"
fi

decode=${exp}/decode/${test_set}
if wanted 4; then
    log "Stage 4: classification of ${test_set}"
    gpus=$((ngpu > 0 ? 1 : 0))
    # shellcheck disable=SC2086
    step --mark "${decode}/done.json" --input "${exp}/${inference_model}" \
        --input "${exp}/config.yaml" --input "${dumpdir}/raw/${test_set}/wav.scp" \
        --output "${decode}/prediction/score" \
        --runner "$(train_runner "${gpus}" 1 1 "${decode}/decode.log")" \
        -- ${python} -m espnet2.bin.cls_inference --output_dir "${decode}" \
        --classification_train_config "${exp}/config.yaml" \
        --classification_model_file "${exp}/${inference_model}" \
        --output_all_probabilities true --data_path_and_name_and_type \
        "${dumpdir}/raw/${test_set}/wav.scp,speech,sound" + --ngpu "${gpus}"
fi

if wanted 5; then
    log "Stage 5: accuracy, mAP -> ${exp}/RESULTS.md"
    step --mark "${exp}/score_mark.json" --input "${decode}/prediction/score" \
        --input "${dumpdir}/raw/${test_set}/labels" --output "${exp}/RESULTS.md" \
        -- python local/cls_score.py --exp_dir "${exp}" \
        --token_list "${tokens}" --score_set "${test_set}" \
        "${dumpdir}/raw/${test_set}/labels" "${decode}/prediction/score"
    [ "${dry_run}" = true ] || sed -n '/^## cls_/,$p' "${exp}/RESULTS.md"
fi

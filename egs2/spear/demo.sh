#!/usr/bin/env bash
# The main job on the embedded data: audio -> teachers -> codes -> student -> its features
# on a task of speech and one of general audio -> recognizers.
# What is finished is not done again; an interrupted run goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

full=false
seeds=(0)
jobs=$(env -u OMP_NUM_THREADS nproc)
while [ $# -gt 0 ]; do
    case $1 in
    --full) full=$2 ;;
    --seeds) read -ra seeds <<<"$2" ;;
    --jobs) jobs=$2 ;;
    *)
        echo "Usage: $0 [--full true|false] [--seeds \"0 1 2\"] [--jobs N]
  --full true   three times the steps of pre-training, more of the teachers' frames
  --seeds \"...\" of each recognizer [0]; three take three times as long
  --jobs N      recognizers trained at once [number of CPUs]" >&2
        exit 2
        ;;
    esac
    shift 2
done

say() { echo "=== $(date '+%H:%M:%S') demo: $*"; }
start=${SECONDS}
tag=spear_mini
ssl_opts=(--quantizer_iters 600 --quantizer_frames 150000)
if [ "${full}" = true ]; then
    tag=spear_mini_full
    ssl_opts=(--quantizer_iters 2000 --quantizer_frames 500000 --quantizer_tag full)
    ssl_opts+=(--train_args "--max_epoch 24 --scheduler_conf warmup_steps_list=[0,300,12000]")
    say "all of the data and three times the steps, up to four hours on 2 CPU cores"
else
    say "30 to 60 minutes on 2 CPU cores"
fi
# Small batches: on a CPU many small steps give more in the same time.
ssl_opts+=(--quantizer_args "--batch_frames 128 --lr 0.01")

say "1/4 data, teachers, codes, pre-training (exp/${tag}), packed student"
ssl1/run.sh --stage 1 --stop_stage 8 --tag "${tag}" "${ssl_opts[@]}"
pretraining=$(((SECONDS - start) / 60))

say "2/4 frozen features of log-mel, the student and its teachers: speakers and sounds"
student=$(cd ssl1 && pwd)/exp/${tag}/valid.loss.best.pth
eval1/run.sh --student "${student}" --tasks "speakers classes"

say "3/4 recognizers: log-mel, frozen student, fine-tuned student"
cd asr1
./run.sh --stage 1 --stop_stage 2
(
    # shellcheck source=asr1/path.sh
    . ./path.sh
    python local/run_systems.py --ckpt "${student}" \
        --expdir "exp/${tag}" --seeds "${seeds[@]}" --jobs "${jobs}" --table "exp/${tag}/table.md"
)

say "4/4 the fine-tuned recognizer, packed, unpacked elsewhere, decoding a file there"
./run.sh --stage 6 --stop_stage 7 --expdir "exp/${tag}" --asr_tag "spear_finetune_s${seeds[0]}" \
    --asr_config conf/train_asr_spear_finetune.yaml
cd ..

say "recognizers on en_test (also in asr1/exp/${tag}/table.md)"
cat "asr1/exp/${tag}/table.md"
say "both worlds (also in eval1/exp/${tag}/demo.md)"
(
    cd eval1
    # shellcheck source=eval1/path.sh
    . ./path.sh
    python local/demo_table.py --asr "../asr1/exp/${tag}/table.json" --tasks speakers classes \
        --features "exp/${tag}/RESULTS.json" --output "exp/${tag}/demo.md"
)
say "curves of pre-training: ssl1/exp/${tag}/images/*.png"
say "$(((SECONDS - start) / 60)) minutes, of which ${pretraining} up to the packed student"

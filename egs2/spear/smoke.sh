#!/usr/bin/env bash
# Both recipes, every stage, on a few seconds of audio and a few steps: shows that they
# run, not that they learn. Writes to smoke/ folders beside the recipes' own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

rm -rf ssl1/smoke asr1/smoke
ssl1/run.sh --datadir smoke/data --dumpdir smoke/dump --expdir smoke/exp \
    --max_utts 12 --quantizer_iters 4 --quantizer_frames 3000 \
    --train_args "--student tiny --student_conf {} --max_epoch 1 --num_iters_per_epoch 3 --num_workers 0"

cd asr1
export SSL_DATA=../ssl1/smoke/dump/raw
folders=(--datadir smoke/data --dumpdir smoke/dump)
./run.sh "${folders[@]}" --expdir smoke/exp --stop_stage 2
(
    # shellcheck source=asr1/path.sh
    . ./path.sh
    python local/run_systems.py --systems spear_frozen --seeds 0 \
        --expdir smoke/exp --table smoke/exp/table.md \
        --ckpt ../ssl1/smoke/exp/spear_mini_speech_audio/valid.loss.best.pth -- \
        "${folders[@]}" --asr_args "--max_epoch 1 --num_iters_per_epoch 2 --num_workers 0"
)
./run.sh "${folders[@]}" --expdir smoke/exp --stage 6 \
    --asr_config conf/train_asr_spear_frozen.yaml --asr_tag spear_frozen_s0

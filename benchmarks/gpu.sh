#!/usr/bin/env bash
# Everything that wants a GPU, in one run: what differs from the CPU, then the benchmarks.
# Prints Markdown; run from the repository's root, in its environment:
#     bash benchmarks/gpu.sh --peer peer | tee gpu.md
set -euo pipefail

help_message="Usage: benchmarks/gpu.sh [options]
  --device NAME    cuda, cuda:1, ...                          [cuda]
  --peer FOLDER    multi-quantization and zipformer 0.1.3, installed as mvq.py's page and
                   zipformer.py's head say; without it ours is measured alone
  --train true     pre-trains base and large for 500 steps each on the embedded data, too,
                   with the demo's teachers (fetches them)     [false]
  --rehearse true  on the CPU, with tiny sizes: shows that the script runs [false]"

device=cuda
peer=
train=false
rehearse=false
# shellcheck source=egs2/spear/ssl1/local/parse_options.sh
. egs2/spear/ssl1/local/parse_options.sh

encoder=(--device "${device}" --bf16 --compile)
encoding=(--device "${device}" --frames 65536 --peer_frames 512)
fbank=(--device "${device}")
training=(--device "${device}" --compile)
sizes=(base large xlarge)
if [ "${rehearse}" = true ]; then
    encoder=(--trials 1 --rounds 1 --utterances 2 --seconds 1)
    encoding=(--dim 64 --num_codebooks 4 --trials 1 --frames 256 --peer_frames 16)
    fbank=(--utterances 4 --batch 2 --seconds 1 --trials 1)
    training=(--sizes tiny --seconds 4 --utterance_seconds 2 --steps 1)
    sizes=(tiny)
elif ! python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "benchmarks/gpu.sh: torch sees no GPU; --rehearse true tries this script without" >&2
    exit 1
fi
beside=()
[ -z "${peer}" ] || beside=(--peer_path "${peer}")

# run <command>: its heading, its output; one that fails does not stop the others
failed=0
run() {
    printf '\n## %s\n\n' "$*"
    "$@" || {
        printf '\n**failed** with status %s\n' "$?"
        failed=$((failed + 1))
    }
}

python - <<'PYTHON'
import platform
import torch

name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"torch {torch.__version__}, {name}, {platform.machine()}")
PYTHON
run python -m pytest -q -rs -p no:warnings tests/test_zipformer_precision.py \
    tests/test_extract.py
run python benchmarks/mvq.py --peer "${peer:-none}" "${encoding[@]}"
run python benchmarks/fbank.py "${fbank[@]}"
for size in "${sizes[@]}"; do
    run python benchmarks/zipformer.py --size "${size}" "${encoder[@]}" "${beside[@]}"
    beside=() # beside the package in the first size only
done
run python benchmarks/pretraining.py "${training[@]}"
if [ "${train}" = true ]; then
    only_list=false
    [ "${rehearse}" = false ] || only_list=true
    for size in base large; do
        # Behind the plan stands what the training measured.
        run python -m espnet2_spear.bin.spear_plan --gpu h200 --num_gpus 1 \
            --config "conf/train_spear_${size}_speech_audio.yaml"
        run bash egs2/spear/ssl1/run.sh --student "${size}" --tag "gpu_${size}" \
            --teachers "speech=whisper_tiny_en audio=yamnet" --ngpu 1 --stop_stage 7 \
            --quantizer_tag gpu \
            --config_override "mixer_conf={} noise_scp=null" --dry_run "${only_list}" \
            --train_args "--max_epoch 1 --num_iters_per_epoch 500 --use_amp true"
        tail -n 20 "egs2/spear/ssl1/exp/gpu_${size}/train.log" || true
    done
fi
if [ "${failed}" -gt 0 ]; then
    echo "benchmarks/gpu.sh: ${failed} commands failed" >&2
    exit 1
fi

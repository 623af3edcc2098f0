#!/usr/bin/env bash
# Let s3prl's own runner (run_downstream) train and evaluate SUPERB's speaker
# identification for some steps on a random student, or on the one that is named:
# tools/check_s3prl.sh [student]. Its clips are tones. The runner imports names that
# huggingface_hub 1.0 and torchaudio 2.9 dropped: .venv-s3prl is an environment of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. tools/own_env.sh

venv=.venv-s3prl
own_env "${venv}" .venv/bin/python espnet-s3prl==2026.5.14 "huggingface_hub<1" \
    "torch<2.9" "torchaudio<2.9" "setuptools<81" tensorboardX librosa safetensors \
    soundfile soxr av omniio

work=$(mktemp -d)
trap 'rm -r "${work}"' EXIT
# s3prl keeps the list of an earlier run's files within its package.
rm -rf "${venv}"/lib/python3*/site-packages/s3prl/downstream/voxceleb1/.cache
project=${PWD}
student=${1:-}
export PYTHONPATH=${project}:${project}/tests OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python=${project}/${venv}/bin/python
"${python}" - "${work}" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
import soundfile
from student_files import write_student

work = Path(sys.argv[1])
write_student(work / "student")
random = np.random.default_rng(0)
time = np.arange(16000) / 16000
tables = {name: [] for name in ("wav.scp", "labels", "groups")}
for i in range(60):
    speaker = i % 3
    tone = 0.3 * np.sin(2 * np.pi * (200 + 400 * speaker) * time)
    noisy = tone + 0.02 * random.standard_normal(len(time))
    soundfile.write(work / f"clip{i:02}.wav", noisy, 16000)
    for name, value in (
        ("wav.scp", work / f"clip{i:02}.wav"),
        ("labels", f"speaker{speaker}"),
        ("groups", f"group{i}"),
    ):
        tables[name].append(f"clip{i:02} {value}\n")
for name, lines in tables.items():
    (work / name).write_text("".join(lines), encoding="utf-8")
PYTHON
eval1=${project}/egs2/spear/eval1
"${python}" "${eval1}/local/voxceleb_layout.py" --wav_scp "${work}/wav.scp" \
    --labels "${work}/labels" --groups "${work}/groups" --out_dir "${work}/layout"
cd "${work}"
runner=("${python}" -m espnet2_spear.launcher -m s3prl.run_downstream --device cpu)
override="config.runner.total_steps=40,,config.runner.log_step=20"
override+=",,config.runner.eval_step=20,,config.runner.save_step=20"
override+=",,config.downstream_expert.datarc.file_path=${work}/layout"
override+=",,config.downstream_expert.datarc.meta_data=${work}/layout/splits.txt"
"${runner[@]}" -m train -p exp -u spear_local \
    -k "${student:-${work}/student/valid.loss.best.pth}" --upstream_feature_normalize \
    -d voxceleb1 -c "${eval1}/conf/s3prl_voxceleb1.yaml" -o "${override}" >train.log 2>&1 ||
    { tail -n 30 train.log >&2; exit 1; }
# Its own checkpoints hold options as objects.
TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 "${runner[@]}" -m evaluate -e exp/dev-best.ckpt \
    >evaluate.log 2>&1 || { tail -n 30 evaluate.log >&2; exit 1; }
grep -o 'test acc: .*' evaluate.log || {
    cat evaluate.log >&2
    exit 1
}

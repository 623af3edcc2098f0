#!/usr/bin/env bash
# Run the scripts of ESPnet's source package, unmodified: the commands with asr.sh, cls.sh and
# ssl.sh of egs2/spear/README.md, and with mini_an4 of egs2/spear/asr1/README.md, as they
# stand there, but with a tiny student, few data and two updates, to the packed model. Then
# open the recognizers in another folder, with all that they were made of gone, and compare
# text.
#   tools/check_espnet.sh [folder to keep]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

project=${PWD}
work=${1:-$(mktemp -d)}
[ $# -gt 0 ] || trap 'rm -rf "${work}"' EXIT
mkdir -p "${work}"
work=$(cd "${work}" && pwd)
. tools/own_env.sh
export LC_ALL=C PYTHONUTF8=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PATH=${project}/.venv/bin:${PATH}
say() { echo "=== $(date '+%H:%M:%S') check_espnet: $*"; }

# The package leaves out links to folders.
espnet=${work}/espnet
version=$(python -c "from importlib.metadata import version; print(version('espnet'))")
if [ ! -e "${espnet}/.complete" ]; then
    say "source package of ESPnet ${version}"
    python -m pip download -q --no-deps --no-build-isolation --no-binary :all: \
        --dest "${work}" "espnet==${version}"
    rm -rf "${espnet}" && mkdir "${espnet}"
    tar -xzf "${work}/espnet-${version}.tar.gz" -C "${espnet}" --strip-components 1
    for name in utils steps scripts pyscripts; do
        for recipe in TEMPLATE/{cls1,ssl1} mini_an4/asr1; do
            ln -sfT ../../TEMPLATE/asr1/${name} "${espnet}/egs2/${recipe}/${name}"
        done
    done
    touch "${espnet}/.complete"
fi

# A copy of this checkout, whose recipes write beside themselves.
spear=${work}/spear
rm -rf "${spear}" "${espnet}/egs2/spear" "${work}"/{gone,elsewhere}
mkdir "${spear}"
git ls-files -z --cached --others --exclude-standard egs2 conf espnet2_spear |
    xargs -0 cp -P --parents -t "${spear}"
export PYTHONPATH=${spear}${PYTHONPATH:+:${PYTHONPATH}}

# What asr.sh calls besides Python: sclite, and sph2pipe for the files of mini_an4.
bin=${work}/bin
mkdir -p "${bin}"
if ! command -v sclite >/dev/null; then
    "${spear}/egs2/spear/ssl1/local/fetch_debs.sh" tools/debs.sha256 "${work}/debs" sctk
    ln -sf "${work}/debs/root/usr/lib/sctk/bin/sclite" "${bin}/sclite"
fi
cat >"${bin}/sph2pipe" <<'PYTHON'
#!/usr/bin/env python3
import io, sys, soundfile
samples, rate = soundfile.read(sys.argv[-1], dtype="int16")
file = io.BytesIO()
soundfile.write(file, samples, rate, format="WAV")
sys.stdout.buffer.write(file.getvalue())
PYTHON
chmod +x "${bin}/sph2pipe"
# An environment on top of .venv, in which alone the plugin is switched on by itself.
if [ ! -e "${work}/env/bin/python3" ]; then
    python -m venv --without-pip "${work}/env"
    packages=$(python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    own=$("${work}/env/bin/python3" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    echo "import site; site.addsitedir('${packages}')" >"${own}/main.pth"
fi
echo "export PATH=${bin}:${work}/env/bin:${project}/.venv/bin:\${PATH}" \
    >"${espnet}/tools/activate_python.sh"

student=${work}/student/valid.loss.best.pth
PYTHONPATH=${PYTHONPATH}:${project}/tests python - "${work}" "${espnet}/egs2/spear/ssl1" <<'PYTHON'
import sys
from pathlib import Path
import numpy, soundfile
from student_files import write_student
from test_tasks import CASES

work, ssl = map(Path, sys.argv[1:])
# At 25 Hz, which no named size has.
write_student(work / "student", arch={"name": "tiny", "output_downsampling_factor": 2})
for folder in ("audio", "meta"):
    (work / "esc50" / folder).mkdir(parents=True, exist_ok=True)
rows = ["filename,fold,target,category,esc10,src_file,take"]
for fold in range(1, 6):
    for i in range(4):
        name = f"{fold}-{1000 + i}-A-{i % 2}.wav"
        wave = numpy.random.default_rng(i).uniform(-0.3, 0.3, 16000)
        soundfile.write(work / "esc50/audio" / name, wave, 16000)
        rows.append(f"{name},{fold},{i % 2},{'ab'[i % 2]},False,{1000 + i},A")
(work / "esc50/meta/esc50.csv").write_text("\n".join(rows) + "\n")

# What ssl.sh is given: audio with a target a frame, a configuration, and the targets.
wavs = sorted((work / "esc50/audio").glob("*.wav"))
for name, part in (("train", wavs[:8]), ("valid", wavs[8:12])):
    folder = work / "targets/raw" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "feats_type").write_text("raw\n")
    frames = " ".join("ab"[i % 2] for i in range((16000 - 1040) // 320))
    for table, value in (("wav.scp", None), ("text", frames), ("utt2spk", "a")):
        lines = "".join(f"{wav.stem} {value or wav}\n" for wav in part)
        (folder / table).write_text(lines)
ssl.mkdir(parents=True)
conf = CASES["ssl-frontend"].conf.replace("CKPT", str(work / "student"))
conf += "num_classes: 6\nbatch_type: unsorted\nbatch_size: 2\nnum_att_plot: 0\n"
(ssl / "train.yaml").write_text(conf + "max_epoch: 1\nnum_workers: 0\n")
(ssl / "tokens.txt").write_text("\n".join(["<blank>", "<unk>", "a", "b", "<sos/eos>", ""]))
PYTHON

# snippet <page> <first words of a line>: the block of shell commands that has it, with
# the student above, on a CPU, with few data and updates
snippet() {
    python - "$1" "$2" <<'PYTHON'
import re, sys
page, words = sys.argv[1:]
blocks = re.findall(r"```sh\n(.*?)```", open(page, encoding="utf-8").read(), re.S)
(block,) = (b for b in blocks if any(x.startswith(words) for x in b.splitlines()))
for pattern, value in (
    (r"^spear=.*$", ""),
    (r"/path/to/dump", "$targets"),
    (r"(ssl1 && \./run\.sh)", r"\1 --max_utts 12 --speech_langs en --audio_sets ufoai"
     " --downloads $project/egs2/spear/ssl1/downloads"),
    (r"--setting esc50", "--setting esc50 --partial true"),
    (r"(\./(?:asr|cls|run)\.sh) --python", r"\1 --ngpu 0 --nj 1 --inference_nj 1 --python"),
    (r"(\./ssl\.sh) --python", r"\1 --ngpu 0 --nj 1 --python"),
    (r"(arch\.name=\$student)", r"\1 --max_epoch 1 --num_iters_per_epoch 2 --num_workers 0"),
):
    block = re.sub(pattern, value, block, flags=re.M)
if words.startswith("./run.sh"):
    block = block.replace("--python spear-python", "")
print(block)
PYTHON
}

# run_block <name> <page> <first words>
run_block() {
    say "$1: commands of $2"
    snippet "$2" "$3" >"${work}/$1.sh"
    # shellcheck disable=SC2097,SC2098
    project=${project} ESC50=${work}/esc50 ESPNET_ROOT=${espnet} spear=${spear} student=${student} \
        targets=${work}/targets bash -e "${work}/$1.sh" >"${work}/$1.log" 2>&1 || {
        tail -n 40 "${work}/$1.log" >&2
        say "FAILED: $1" >&2
        return 1
    }
    say "$1: done"
}

# Most of it is starts of Python: side by side.
"${work}/env/bin/python3" -m espnet2_spear.autoload on
jobs=()
run_block asr egs2/spear/README.md "./asr.sh" &
jobs+=("$!")
run_block cls egs2/spear/README.md "./cls.sh" &
jobs+=("$!")
run_block ssl egs2/spear/README.md "iter=0 ./ssl.sh" &
jobs+=("$!")
# This one by plain python, which autoload is for; spear-python is another.
run_block mini_an4 egs2/spear/asr1/README.md "./run.sh --python" &
jobs+=("$!")
failed=false
for job in "${jobs[@]}"; do wait "${job}" || failed=true; done
"${work}/env/bin/python3" -m espnet2_spear.autoload off
[ "${failed}" = false ] || exit 1

say "the packed models, elsewhere"
for recipe in spear/asr1 mini_an4/asr1; do
    data=${spear}/egs2/spear/asr1/dump/raw/en_test
    [ "${recipe}" = spear/asr1 ] || data=dump/raw/test
    (cd "${espnet}/egs2/${recipe}" && python "${project}/tools/espnet_packed.py" take \
        "${work}/elsewhere/${recipe}" "${data}" "${spear}/conf/decode_asr_ctc.yaml")
done
mkdir "${work}/gone" # what they were made of
mv "${espnet}" "${spear}/egs2" "${work}/student" "${work}/gone"
for recipe in spear/asr1 mini_an4/asr1; do
    python tools/espnet_packed.py compare "${work}/elsewhere/${recipe}"
done
mv "${work}/gone/espnet" "${espnet}"
say "all texts are the same"

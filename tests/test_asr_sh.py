"""The commands of ESPnet's own asr.sh, with ``--python spear-python``.

asr.sh is in no package. What follows issues its command lines of stages 5 and 10 to 14
(egs2/TEMPLATE/asr1/asr.sh of espnet/espnet at 004c30c, default options, characters;
without ``launch --debug``, which is newer than ESPnet 202611) with the configuration of
this recipe, on noise. Its ``run.pl`` is the recipe's run_job.sh.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import soundfile
from student_files import write_student

from espnet2_spear import doctor
from espnet2_spear.hub.packed import unpack_model

ROOT = Path(__file__).resolve().parent.parent
RUN_PL = """#!/usr/bin/env bash
if [ "$1" = --name ]; then shift 2; fi
exec bash {job} "$@"
"""
CONFIG = ROOT / "conf/train_asr_spear_frozen.yaml"
SETS = {"train": "ABCD", "dev": "EF", "test": "GH"}
TEXT = ("--token_type", "char", "--non_linguistic_symbols", "none")
BOTH = (*TEXT, "--cleaner", "none", "--g2p", "none")

pytestmark = pytest.mark.second_env


class Recipe:
    """A recipe's folder: its data, and what runs in it."""

    def __init__(self, folder: Path, python: str) -> None:
        self.folder, self.python = folder, python.split()
        self.env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.env["PYTHONPATH"] = str(ROOT)
        run_pl = folder / "run.pl"
        run_pl.write_text(RUN_PL.format(job=ROOT / "egs2/spear/asr1/local/run_job.sh"))
        run_pl.chmod(0o755)
        rng = np.random.default_rng(0)
        for name, utts in SETS.items():
            data = folder / "dump/raw" / name
            data.mkdir(parents=True)
            wavs = {utt: data / f"{utt}.wav" for utt in utts}
            for wav in wavs.values():
                noise = 0.1 * rng.standard_normal(int(rng.integers(12000, 20000)))
                soundfile.write(wav, noise.astype(np.float32), 16000)
            self.table(data / "wav.scp", wavs)
            self.table(data / "text", {utt: f"{utt} AB CAB" for utt in utts})
            self.table(data / "utt2spk", dict.fromkeys(utts, "s"))

    @staticmethod
    def table(path: Path, values: Mapping[str, object]) -> None:
        path.write_text("".join(f"{key} {value}\n" for key, value in values.items()))

    def run(self, *command: str, jobs: int = 0, text: str = "") -> str:
        """Run ``${python} -m espnet2.bin...``, under run.pl for jobs; its output."""
        line = [*self.python, "-m", *command]
        if jobs:
            log = f"exp/log/{command[0]}.JOB.log"
            line = ["./run.pl", "--gpu", "0", f"JOB=1:{jobs}", log, *line]
        done = subprocess.run(
            line,
            cwd=self.folder,
            env=self.env,
            input=text,
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def data(self, name: str, split: str) -> list[str]:
        """Options with the data of one set."""
        option, at = f"--{split}_data_path_and_name_and_type", f"dump/raw/{name}"
        return [option, f"{at}/wav.scp,speech,sound", option, f"{at}/text,text,text"]

    def split(self, name: str, prefix: str, jobs: int) -> None:
        """What utils/split_scp.pl does."""
        lines = (self.folder / f"dump/raw/{name}/wav.scp").read_text().splitlines()
        (self.folder / prefix).parent.mkdir(parents=True, exist_ok=True)
        for job, part in enumerate(np.array_split(lines, jobs), start=1):
            text = "".join(f"{line}\n" for line in part)
            (self.folder / f"{prefix}.{job}.scp").write_text(text)


def test_commands_of_asr_sh(tmp_path: Path) -> None:
    student = write_student(tmp_path / "student").parent
    recipe = Recipe(tmp_path, f"{Path(sys.executable).parent}/spear-python")
    (tmp_path / "lm_train.txt").write_text(
        (tmp_path / "dump/raw/train/text").read_text()
    )
    # Stage 5.
    recipe.run(
        *("espnet2.bin.tokenize_text", *BOTH, "--field", "2-"),
        *("--input", "lm_train.txt", "--output", "tokens.txt"),
        *("--write_vocabulary", "true", "--add_symbol", "<blank>:0"),
        *("--add_symbol", "<unk>:1", "--add_symbol", "<sos/eos>:-1"),
    )
    tokens = (tmp_path / "tokens.txt").read_text().split()
    assert tokens[:2] == ["<blank>", "<unk>"] and tokens[-1] == "<sos/eos>"
    # Stage 10: --asr_args, --feats_normalize null.
    more = ["--config", str(CONFIG), "--frontend_conf", "fs=16k"]
    more += ["--frontend_conf", f"ckpt={student}", "--batch_bins", "40000"]
    more += ["--num_iters_per_epoch", "2", "--max_epoch", "1", "--num_workers", "0"]
    common = ["--use_preprocessor", "true", "--bpemodel", "none", *BOTH]
    common += ["--token_list", "tokens.txt"]
    for name, split in (("train", "train"), ("dev", "valid")):
        recipe.split(name, f"exp/stats/logdir/{split}", 2)
    recipe.run(
        *("espnet2.bin.asr_train", "--collect_stats", "true", *common),
        *recipe.data("train", "train"),
        *recipe.data("dev", "valid"),
        *("--train_shape_file", "exp/stats/logdir/train.JOB.scp"),
        *("--valid_shape_file", "exp/stats/logdir/valid.JOB.scp"),
        *("--output_dir", "exp/stats/logdir/stats.JOB", *more),
        jobs=2,
    )
    parts = [f"exp/stats/logdir/stats.{job}" for job in (1, 2)]
    parts = [word for part in parts for word in ("--input_dir", part)]
    recipe.run("espnet2.bin.aggregate_stats_dirs", *parts, "--output_dir", "exp/stats")
    shapes = []
    for split in ("train", "valid"):
        source = tmp_path / f"exp/stats/{split}/text_shape"
        lines = source.read_text().splitlines()
        assert len(lines) == len(SETS["train" if split == "train" else "dev"])
        text = "".join(f"{line},{len(tokens)}\n" for line in lines)
        source.with_name("text_shape.char").write_text(text)
        for shape in ("speech_shape", "text_shape.char"):
            shapes += [f"--{split}_shape_file", f"exp/stats/{split}/{shape}"]
    # Stage 11.
    recipe.run(
        *("espnet2.bin.launch", "--cmd", "./run.pl --name exp/asr/train.log"),
        *("--log", "exp/asr/train.log", "--ngpu", "0", "--num_nodes", "1"),
        *("--init_file_prefix", "exp/asr/.dist_init_"),
        *("--multiprocessing_distributed", "true", "--", *recipe.python),
        *("-m", "espnet2.bin.asr_train", *common, *recipe.data("dev", "valid")),
        *("--resume", "true", "--init_param", "--ignore_init_mismatch", "false"),
        *("--fold_length", "80000", "--fold_length", "150"),
        *("--output_dir", "exp/asr", *more, *recipe.data("train", "train"), *shapes),
    )
    # Stage 12.
    recipe.split("test", "exp/asr/decode/test/logdir/keys", 1)
    files = ["--asr_train_config", "exp/asr/config.yaml"]
    files += ["--asr_model_file", "exp/asr/valid.cer_ctc.ave.pth"]
    recipe.run(
        *("espnet2.bin.asr_inference", "--batch_size", "1", "--ngpu", "0"),
        *("--data_path_and_name_and_type", "dump/raw/test/wav.scp,speech,sound"),
        *("--key_file", "exp/asr/decode/test/logdir/keys.JOB.scp", *files),
        *("--output_dir", "exp/asr/decode/test/logdir/output.JOB"),
        *("--config", str(ROOT / "conf/decode_asr_ctc.yaml")),
        jobs=1,
    )
    output = tmp_path / "exp/asr/decode/test/logdir"
    found = (output / "output.1/1best_recog/text").read_text().splitlines()
    assert sorted(line.split()[0] for line in found) == sorted(SETS["test"])
    # Stage 13.
    text = (tmp_path / "dump/raw/test/text").read_text()
    words = recipe.run(
        *("espnet2.bin.tokenize_text", "-f", "2-", "--input", "-", "--output", "-"),
        *("--token_type", "word", "--non_linguistic_symbols", "none"),
        *("--remove_non_linguistic_symbols", "true", "--cleaner", "none"),
        text=text,
    )
    assert words.splitlines() == [
        line.split(maxsplit=1)[1] for line in text.splitlines()
    ]
    # Stage 14: the model opens where the student is, and the doctor says so.
    (tmp_path / "exp/asr/RESULTS.md").write_text("# RESULTS\n")
    (tmp_path / "exp/asr/images").mkdir(exist_ok=True)
    recipe.run(
        *("espnet2.bin.pack", "asr", *files, "--option", "exp/asr/RESULTS.md"),
        *("--option", "exp/asr/images", "--outpath", "exp/asr/packed.zip"),
    )
    report = doctor.Report(lambda line: None)
    doctor.check_model(report, tmp_path / "exp/asr/packed.zip")
    assert f"only where {student} is" in report.problems[0]
    assert "task_pack" in report.problems[0]
    from espnet2.bin.asr_inference import Speech2Text

    names = unpack_model(tmp_path / "exp/asr/packed.zip", tmp_path / "elsewhere")
    speech, _ = soundfile.read(tmp_path / "dump/raw/test/G.wav", dtype="float32")
    result = Speech2Text(**names, ctc_weight=1.0, lm_weight=0.0, beam_size=3)(speech)
    (line,) = [line for line in found if line.split()[0] == "G"]
    assert result[0][0] == " ".join(line.split(" ")[1:])

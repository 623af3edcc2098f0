"""The commands of ESPnet's asr.sh, cls.sh and ssl.sh, with ``--python spear-python``.

Trainings, and the decoding of asr.sh, are processes of that Python; the rest runs here.

What follows issues their command lines, with default options, on noise in sets that
spear_format, spear_filter and cls_sets.py made (check_espnet.sh runs the scripts): of
egs2/TEMPLATE/asr1/asr.sh (espnet/espnet at 004c30c; characters; without
``launch --debug``, which is newer than ESPnet 202611) stages 5, 10 to 12 and 14, of
cls1/cls.sh (000bf3f) 4 to 7 and 9, of ssl1/ssl.sh (20e3471) 6 to 8. Their ``run.pl`` is
the recipe's run_job.sh.
"""

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import soundfile
from student_files import write_student
from test_tasks import CASES

from espnet2_spear import doctor
from espnet2_spear.bin import spear_filter, spear_format
from espnet2_spear.hub.packed import unpack_model

PYTHON = f"{Path(sys.executable).parent}/spear-python"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "egs2/spear/cls1/local"))
import cls_sets  # noqa: E402

RUN_PL = """#!/usr/bin/env bash
if [ "$1" = --name ]; then shift 2; fi
exec bash {job} "$@"
"""
CONFIG = ROOT / "conf/train_asr_spear_frozen.yaml"
SETS = {"train": "ABCD", "dev": "EF", "test": "GH"}
TEXT = ("--token_type", "char", "--non_linguistic_symbols", "none")
BOTH = (*TEXT, "--cleaner", "none", "--g2p", "none")


class Recipe:
    """A recipe's folder: its data, and what runs in it."""

    def __init__(self, folder: Path, python: str) -> None:
        self.folder, self.python = folder, python.split()
        self.env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.env["PYTHONPATH"] = str(ROOT)
        run_pl = folder / "run.pl"
        run_pl.write_text(RUN_PL.format(job=ROOT / "egs2/spear/ssl1/local/run_job.sh"))
        run_pl.chmod(0o755)
        rng = np.random.default_rng(0)
        for name, utts in SETS.items():
            data = folder / "data" / name
            data.mkdir(parents=True)
            wavs = {utt: data / f"{utt}.wav" for utt in utts}
            for wav in wavs.values():
                noise = 0.1 * rng.standard_normal(int(rng.integers(12000, 20000)))
                soundfile.write(wav, noise.astype(np.float32), 16000)
            self.table(data / "wav.scp", wavs)
            self.table(data / "text", {utt: f"{utt} AB CAB" for utt in utts})
            self.table(data / "utt2spk", dict.fromkeys(utts, "s"))
            org, raw = (folder / "dump/raw" / part / name for part in ("org", ""))
            spear_format.main(["--in_dir", str(data), "--out_dir", str(org)])
            spear_filter.main(["--in_dir", str(org), "--out_dir", str(raw)])
            # What the scripts read at their first stage from here on.
            assert (raw / "feats_type").read_text() == "raw\n"

    @staticmethod
    def table(path: Path, values: Mapping[str, object]) -> None:
        path.write_text("".join(f"{key} {value}\n" for key, value in values.items()))

    def run(self, *command: str, job: bool = False) -> None:
        """Run ``${python} -m espnet2.bin...``, under run.pl for a job."""
        line = [*self.python, "-m", *command]
        if job:
            log = f"exp/log/{command[0]}.JOB.log"
            line = ["./run.pl", "--gpu", "0", "JOB=1:1", log, *line]
        done = subprocess.run(
            line, cwd=self.folder, env=self.env, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    @staticmethod
    def call(module: str, *options: str) -> None:
        """Run it in this process, in the folder."""
        words = [option.replace("JOB", "1") for option in options]
        importlib.import_module(module).main(cmd=words)

    def data(self, name: str, split: str) -> list[str]:
        """Options with the data of one set."""
        option, at = f"--{split}_data_path_and_name_and_type", f"dump/raw/{name}"
        return [option, f"{at}/wav.scp,speech,sound", option, f"{at}/text,text,text"]

    def stats(self, task: str, *options: str) -> None:
        """Collect statistics, and aggregate them."""
        for name, split in (("train", "train"), ("dev", "valid")):
            self.split(name, f"exp/stats/logdir/{split}")
        words = [f"espnet2.bin.{task}_train", "--collect_stats", "true", *options]
        words += ["--train_shape_file", "exp/stats/logdir/train.JOB.scp"]
        words += ["--valid_shape_file", "exp/stats/logdir/valid.JOB.scp"]
        words += ["--output_dir", "exp/stats/logdir/stats.JOB"]
        self.call(*words)
        skip = ["--skip_sum_stats"] if task == "ssl" else []
        self.call(
            *("espnet2.bin.aggregate_stats_dirs", *skip, "--output_dir", "exp/stats"),
            *("--input_dir", "exp/stats/logdir/stats.1"),
        )

    def launch(self, task: str, *options: str) -> None:
        """Train under espnet2.bin.launch."""
        self.run(
            *("espnet2.bin.launch", "--cmd", "./run.pl --name exp/train/train.log"),
            *("--log", "exp/train/train.log", "--ngpu", "0", "--num_nodes", "1"),
            *("--init_file_prefix", "exp/train/.dist_init_"),
            *("--multiprocessing_distributed", "true", "--", *self.python),
            *("-m", f"espnet2.bin.{task}_train", "--use_preprocessor", "true"),
            *("--resume", "true", "--output_dir", "exp/train", *options),
        )

    def split(self, name: str, prefix: str) -> None:
        """What utils/split_scp.pl does for one job."""
        (self.folder / prefix).parent.mkdir(parents=True, exist_ok=True)
        source = self.folder / f"dump/raw/{name}/wav.scp"
        shutil.copy(source, self.folder / f"{prefix}.1.scp")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    return Recipe(tmp_path, PYTHON)


def test_commands_of_asr_sh(tmp_path: Path, recipe: Recipe) -> None:
    student = write_student(tmp_path / "student").parent
    (tmp_path / "lm_train.txt").write_text(
        (tmp_path / "dump/raw/train/text").read_text()
    )
    # Stage 5.
    recipe.call(
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
    common += ["--token_list", "tokens.txt", *recipe.data("dev", "valid")]
    train = recipe.data("train", "train")
    recipe.stats("asr", *common, *train, *more)
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
    recipe.launch(
        *("asr", *common, "--init_param", "--ignore_init_mismatch", "false"),
        *("--fold_length", "80000", "--fold_length", "150", *more, *train, *shapes),
    )
    # Stage 12.
    recipe.split("test", "exp/train/decode/test/logdir/keys")
    files = ["--asr_train_config", "exp/train/config.yaml"]
    files += ["--asr_model_file", "exp/train/valid.cer_ctc.ave.pth"]
    recipe.run(
        *("espnet2.bin.asr_inference", "--batch_size", "1", "--ngpu", "0"),
        *("--data_path_and_name_and_type", "dump/raw/test/wav.scp,speech,sound"),
        *("--key_file", "exp/train/decode/test/logdir/keys.JOB.scp", *files),
        *("--output_dir", "exp/train/decode/test/logdir/output.JOB"),
        *("--config", str(ROOT / "conf/decode_asr_ctc.yaml")),
        job=True,
    )
    output = tmp_path / "exp/train/decode/test/logdir"
    found = (output / "output.1/1best_recog/text").read_text().splitlines()
    assert sorted(line.split()[0] for line in found) == sorted(SETS["test"])
    # Stage 14: the model opens where the student is, and the doctor says so.
    (tmp_path / "exp/train/RESULTS.md").write_text("# RESULTS\n")
    (tmp_path / "exp/train/images").mkdir(exist_ok=True)
    recipe.call(
        *("espnet2.bin.pack", "asr", *files, "--option", "exp/train/RESULTS.md"),
        *("--option", "exp/train/images", "--outpath", "exp/train/packed.zip"),
    )
    report = doctor.Report(lambda line: None)
    doctor.check_model(report, tmp_path / "exp/train/packed.zip")
    assert f"only where {student} is" in report.problems[0]
    assert "task_pack" in report.problems[0]
    from espnet2.bin.asr_inference import Speech2Text

    names = unpack_model(tmp_path / "exp/train/packed.zip", tmp_path / "elsewhere")
    speech, _ = soundfile.read(tmp_path / "data/test/G.wav", dtype="float32")
    result = Speech2Text(**names, ctc_weight=1.0, lm_weight=0.0, beam_size=3)(speech)
    (line,) = [line for line in found if line.split()[0] == "G"]
    assert result[0][0] == " ".join(line.split(" ")[1:])


def configured(recipe: Recipe, name: str) -> list[str]:
    """A configuration of test_tasks and more options, as --train_config says them."""
    student = write_student(recipe.folder / "student").parent
    config = recipe.folder / "train.yaml"
    config.write_text(CASES[name].conf.replace("CKPT", str(student)), encoding="utf-8")
    options = ["--config", "train.yaml", "--frontend_conf", "fs=16k"]
    options += ["--batch_type", "unsorted", "--batch_size", "2", "--max_epoch", "1"]
    return [*options, "--num_workers", "0", "--num_att_plot", "0"]


def labels(options: list[str], name: str) -> list[str]:
    return [option.replace(",text,text", f",{name},text") for option in options]


def test_commands_of_cls_sh(tmp_path: Path, recipe: Recipe) -> None:
    pytest.importorskip("torcheval", reason="ESPnet's task needs it")
    for name, utts in SETS.items():
        words = {utt: ("dog", "cat")[i % 2] for i, utt in enumerate(utts)}
        recipe.table(tmp_path / f"{name}.labels", words)
        raw = tmp_path / "dump/raw" / name
        options = ["--labels", str(tmp_path / f"{name}.labels"), "--set_dir", str(raw)]
        options += ["--token_list", str(tmp_path / "classes.txt")]
        cls_sets.main(options + ["--train"] * (name == "train"))
        assert (raw / "text").read_text() == (raw / "labels").read_text()
    more = configured(recipe, "cls-frontend")
    # Stage 4.
    recipe.call(
        *("espnet2.bin.tokenize_text", "--token_type", "word", "--field", "2-"),
        *("--input", "dump/raw/train/text", "--output", "tokens.txt"),
        *("--write_vocabulary", "true"),
        *("--add_symbol", "<unk>:-1", "--add_symbol", "<blank>:-2"),
    )
    # Stages 5 and 6.
    data = [*recipe.data("train", "train"), *recipe.data("dev", "valid")]
    more += ["--token_type", "word", "--token_list", "tokens.txt"]
    more += labels(data, "label")
    recipe.stats("cls", "--use_preprocessor", "true", *more)
    shapes = [
        word
        for split in ("train", "valid")
        for shape in ("speech_shape", "label_shape")
        for word in (f"--{split}_shape_file", f"exp/stats/{split}/{shape}")
    ]
    folds = ["--fold_length", "800", "--fold_length", "150"]
    recipe.launch("cls", *more, *shapes, *folds)
    # Stages 7 and 9.
    recipe.split("test", "exp/train/cls_test/logdir/keys")
    files = ["--classification_train_config", "exp/train/config.yaml"]
    files += ["--classification_model_file", "exp/train/1epoch.pth"]
    recipe.call(
        *("espnet2.bin.cls_inference", "--ngpu", "0"),
        *("--data_path_and_name_and_type", "dump/raw/test/wav.scp,speech,sound"),
        *("--key_file", "exp/train/cls_test/logdir/keys.JOB.scp", *files),
        *("--output_dir", "exp/train/cls_test/logdir/output.JOB"),
        *("--output_all_probabilities", "true"),
    )
    output = tmp_path / "exp/train/cls_test/logdir/output.1/prediction"
    found = dict(line.split() for line in (output / "text").read_text().splitlines())
    assert set(found) == set(SETS["test"]) and set(found.values()) <= {"dog", "cat"}
    recipe.call(
        *("espnet2.bin.pack", "cls", *files, "--option", "tokens.txt"),
        *("--outpath", "exp/train/packed.zip"),
    )
    assert (tmp_path / "exp/train/packed.zip").stat().st_size > 0


def test_commands_of_ssl_sh(tmp_path: Path, recipe: Recipe) -> None:
    for name in SETS:
        frames = {}
        for line in (tmp_path / f"dump/raw/{name}/wav.scp").read_text().splitlines():
            utt, path = line.split()
            count = (soundfile.info(path).frames - 1040) // 320
            frames[utt] = f"{utt} {' '.join('ab'[i % 2] for i in range(count))}"
        text = tmp_path / f"dump/raw/{name}/text"
        text.write_text("".join(f"{line}\n" for line in frames.values()))
    more = configured(recipe, "ssl-frontend")
    tokens = "\n".join(["<blank>", "<unk>", "a", "b", "<sos/eos>", ""])
    (tmp_path / "tokens.txt").write_text(tokens)
    more += ["--num_classes", "6", "--token_list", "tokens.txt", "--token_type", "word"]
    more += [*recipe.data("train", "train"), *recipe.data("dev", "valid")]
    # Stages 6 to 8.
    recipe.stats("ssl", "--use_preprocessor", "true", "--normalize", "none", *more)
    shapes = [
        *("--train_shape_file", "exp/stats/train/speech_shape"),
        *("--valid_shape_file", "exp/stats/valid/speech_shape"),
        *("--fold_length", "80000", "--fold_length", "150", "--normalize", "null"),
    ]
    recipe.launch("ssl", *more, *shapes)
    recipe.call(
        *("espnet2.bin.pack", "ssl", "--ssl_train_config", "exp/train/config.yaml"),
        *("--ssl_model_file", "exp/train/1epoch.pth"),
        *("--outpath", "exp/train/packed.zip"),
    )
    assert "frontend: spear" in (tmp_path / "exp/train/config.yaml").read_text()
    assert (tmp_path / "exp/train/packed.zip").stat().st_size > 0

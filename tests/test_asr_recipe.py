"""The recipe asr1: corpora made its sets."""

import os
import subprocess
from pathlib import Path

import pytest
from corpus_miniatures import librispeech

from espnet2_spear.fileio.datadir import DataDir

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "egs2/spear/asr1"


def run_sh(*options: str, **env: str) -> subprocess.CompletedProcess:
    command = ["bash", str(RECIPE / "run.sh"), *options]
    env = {**os.environ, **env}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_sets_from_a_corpus(tmp_path: Path) -> None:
    librispeech(tmp_path / "corpus")
    # The miniature has fewer utterances than published: the check is another test's.
    prepare = "train=librispeech:train-clean-100 dev=librispeech:dev-clean"
    options = ["--stop_stage", "1", "--nj", "1", "--prepare", prepare]
    options += ["--train_set", "train", "--valid_set", "dev", "--test_sets", "dev"]
    options += [
        "--datadir",
        str(tmp_path / "data"),
        "--dumpdir",
        str(tmp_path / "dump"),
    ]
    done = run_sh(*options, LIBRISPEECH=str(tmp_path / "corpus"))
    assert done.returncode != 0 and "2 utterances instead of" in done.stderr
    done = run_sh(*options, "--partial", "true", LIBRISPEECH=str(tmp_path / "corpus"))
    assert done.returncode == 0, done.stdout + done.stderr
    data = DataDir.load(tmp_path / "dump/raw/train")
    data.validate(require=("text", "utt2num_samples"))
    assert data.text["librispeech-19-198-0000"] == "NORTHANGER ABBEY"
    assert data.utt2num_samples["librispeech-19-198-0000"] == 11200
    again = run_sh(*options, "--partial", "true", LIBRISPEECH=str(tmp_path / "corpus"))
    assert "raw/dev was prepared before" in again.stdout


@pytest.mark.parametrize("item", ["train", "train=librispeech", "train=nobody:x"])
def test_bad_sets_are_refused(tmp_path: Path, item: str) -> None:
    done = run_sh("--prepare", item, "--datadir", str(tmp_path), "--stop_stage", "1")
    assert done.returncode == 2 and f"--prepare '{item}'" in done.stdout


def test_every_gpu_gets_a_process(tmp_path: Path) -> None:
    """By Slurm, with a stand-in of sbatch that runs nothing."""
    for path in ("data/token_list/char/tokens.txt", "dump/raw/en_dev/wav.scp"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >{tmp_path}/args\n')
    sbatch.chmod(0o755)
    options = ["--stage", "3", "--stop_stage", "3", "--asr_tag", "t"]
    options += ["--asr_config", "conf/train_asr_logmel.yaml"]
    options += [f"--{name}dir={tmp_path / name}" for name in ("data", "dump", "exp")]
    path = f"{tmp_path}:{os.environ['PATH']}"
    for nodes in ("1", "2"):
        options += ["--ngpu", "8", "--num_nodes", nodes, "--nj", "32"]
        done = run_sh(*options, PATH=path, cmd_backend="slurm", OMP_NUM_THREADS="3")
        assert done.returncode == 0, done.stdout + done.stderr
        script = (tmp_path / "exp/asr_t/train.log.sbatch").read_text()
        assert " env OMP_NUM_THREADS=3 " in script  # what it was before
        assert "--ngpu 8 --multiprocessing_distributed true" in script
        args = (tmp_path / "args").read_text().splitlines()
        assert {"--gres=gpu:8", "--cpus-per-task=32"} <= set(args)
        assert ("--nodes=2" in args) == (nodes == "2")
    assert " srun " in script and "--dist_launcher slurm" in script
    assert f"--dist_init_method file://{tmp_path}/exp/asr_t/.dist_init." in script

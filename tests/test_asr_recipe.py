"""The recipe asr1: corpora made its sets."""

import os
import shlex
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
from corpus_miniatures import librispeech
from data_dirs import read_dir, write_dir
from espnet2.train.dataset import ESPnetDataset
from recipe_scripts import RECIPES, folders, run_script

from espnet2_spear.bin import spear_format
from espnet2_spear.fileio.datadir import Entry

RECIPE = RECIPES / "asr1"
run_sh = partial(run_script, "asr1/run.sh")


def test_sets_from_a_corpus(tmp_path: Path) -> None:
    librispeech(tmp_path / "corpus")
    # The miniature has fewer utterances than published: the check is another test's.
    prepare = "train=librispeech:train-clean-100 dev=librispeech:dev-clean"
    options = ["--stop_stage", "1", "--nj", "1", "--prepare", prepare]
    options += ["--train_set", "train", "--valid_set", "dev", "--test_sets", "dev"]
    options += folders(tmp_path)
    done = run_sh(*options, LIBRISPEECH=str(tmp_path / "corpus"))
    assert done.returncode != 0 and "2 utterances instead of" in done.stderr
    done = run_sh(*options, "--partial", "true", LIBRISPEECH=str(tmp_path / "corpus"))
    assert done.returncode == 0, done.stdout + done.stderr
    data = read_dir(tmp_path / "dump/raw/train", "text", "utt2num_samples")
    entry = data["librispeech-19-198-0000"]
    assert (entry.text, entry.samples) == ("NORTHANGER ABBEY", 11200)
    assert (tmp_path / "dump/raw/train/feats_type").read_text() == "raw\n"
    # The same is not done again; another folder or another part is, and that is said.
    again = run_sh(*options, "--partial", "true", LIBRISPEECH=str(tmp_path / "corpus"))
    assert again.stdout.count("same inputs and options: skipped") == 6
    options += ["--partial", "true", "--dry_run", "true"]
    shutil.copytree(tmp_path / "corpus", tmp_path / "moved")
    moved = run_sh(*options, LIBRISPEECH=str(tmp_path / "moved"))
    assert moved.stdout.count(f"{tmp_path}/corpus is no longer read") == 2
    other = ["--prepare", prepare.replace("dev-clean", "dev-other")]
    other = run_sh(*options, *other, LIBRISPEECH=str(tmp_path / "corpus"))
    assert "--parts was dev-clean, is dev-other" in other.stdout


@pytest.mark.parametrize(
    ("formats", "outcome"),
    [
        (["flac"], "sound"),
        (["flac.ark"], "kaldi_ark"),
        (["wav.ark"], "holds WAV, which ESPnet reads from arks as 16-bit"),
        (["flac", "flac.ark"], "names files and entries of arks"),
        (["flac.ark", "gone"], "1 files are missing, for example"),
    ],
)
def test_sets_in_arks(
    tmp_path: Path, formats: list[str], outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ssl1's --audio_format, or an ESPnet recipe, writes them."""
    samples = np.random.default_rng(0).uniform(-0.3, 0.3, 16000)
    soundfile.write(tmp_path / "a.wav", samples, 16000)
    root, found = tmp_path / "root", []
    for audio_format in formats:
        utt, out = f"u-{audio_format}", root / audio_format
        if audio_format == "gone":
            found.append(Entry(utt, "gone.ark:5", "s", text="A", samples=16000))
            continue
        write_dir(tmp_path / "in", [Entry(utt, f"{tmp_path}/a.wav", "s", text="A")])
        options = ["--in_dir", str(tmp_path / "in"), "--out_dir", str(out)]
        spear_format.main([*options, "--audio_format", audio_format])
        found += read_dir(out).values()
    # As ssl1 has them: relative to its folder.
    relative = [e._replace(path=os.path.relpath(e.path, root)) for e in found]
    write_dir(root / "sets/train", relative)
    sets = [f"--{name}=train" for name in ("train_set", "valid_set", "test_sets")]
    options = [*folders(tmp_path), *sets, "--stop_stage", "1"]
    env = {"SSL_DATA": str(root / "sets"), "SSL_ROOT": str(root)}
    done = run_sh(*options, **env)
    if outcome not in ("sound", "kaldi_ark"):
        assert done.returncode == 1 and outcome in done.stderr
        return
    assert done.returncode == 0, done.stdout + done.stderr
    options = [*folders(tmp_path), *sets, "--stage", "3", "--stop_stage", "4"]
    options += ["--asr_config", "conf/train_asr_logmel.yaml", "--dry_run", "true"]
    listed = run_sh(*options, "--ngpu", "0").stdout
    table = tmp_path / "dump/raw/train/wav.scp"
    assert listed.count(f"{table},speech,{outcome}") == 3  # train, valid, decoding
    monkeypatch.chdir(RECIPE)  # where the paths start
    data = ESPnetDataset([(str(table), "speech", outcome)])
    speech = data[f"u-{formats[0]}"][1]["speech"]
    np.testing.assert_allclose(speech, samples, atol=1e-4)


def test_listing_of_all_stages(tmp_path: Path) -> None:
    options = folders(tmp_path)
    options += ["--asr_config", "conf/train_asr_logmel.yaml", "--token_type", "bpe"]
    done = run_sh("--dry_run", "true", "--ngpu", "0", "--nbpe", "500", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(tmp_path.iterdir())
    stages = done.stdout.split("Stage ")
    assert [part[0] for part in stages[1:]] == ["1", "2", "3", "4", "4", "5", "6", "7"]
    for part in stages[1:]:
        assert "  $ " in part and " reads " in part and "would run" in part
        assert " writes " in part or part.startswith("7")
    # Where asr.sh looks for it.
    tokens = tmp_path / "data/token_list/bpe_unigram500"
    assert f"writes  {tokens}/tokens.txt" in stages[2]
    assert f"writes  {tokens}/bpe.model" in stages[2]


def test_listing_with_a_student_yet_to_be_pretrained(tmp_path: Path) -> None:
    options = folders(tmp_path)
    config = (RECIPES / "asr1/conf/train_asr_spear_frozen.yaml").read_text()
    assert "\nfrontend: spear\n" in config
    config = config.replace("\nfrontend: spear\n", '\nfrontend: "spear"  # ours\n')
    (tmp_path / "own.yaml").write_text(config)
    options += ["--asr_config", str(tmp_path / "own.yaml"), "--ngpu", "0"]
    options += ["--ckpt", str(tmp_path / "student.pth"), "--stage", "3"]
    done = run_sh("--dry_run", "true", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"reads   {tmp_path}/student.pth (not there yet)" in done.stdout


def write_tokens(folder: Path) -> None:
    """What stage 2 leaves, empty."""
    tokens = folder / "data/token_list/char"
    tokens.mkdir(parents=True)
    for name in ("tokens.txt", "text_shape.en_train", "text_shape.en_dev"):
        (tokens / name).touch()


def test_another_training_wants_another_tag(tmp_path: Path) -> None:
    entry = Entry("u", "u.wav", "u", text="A", samples=16000)
    for name in ("en_train", "en_dev"):
        write_dir(tmp_path / "dump/raw" / name, [entry])
    options = folders(tmp_path)
    options += ["--asr_config", "conf/train_asr_logmel.yaml", "--ngpu", "0"]
    write_tokens(tmp_path)
    # A training that does not end well, here at once.
    options += ["--stage", "3", "--stop_stage", "3", "--python", "false"]
    done = run_sh(*options, "--asr_args", "--max_epoch 3")
    assert done.returncode != 0
    done = run_sh(*options, "--asr_args", "--max_epoch 4")
    assert "(--max_epoch was 3, is 4); give another --asr_tag" in done.stderr
    write_dir(tmp_path / "dump/raw/en_train", [entry._replace(text="B")])
    done = run_sh(*options, "--asr_args", "--max_epoch 3", "--dry_run", "true")
    assert f"{tmp_path}/dump/raw/en_train changed" in done.stdout
    done = run_sh(*options, "--asr_args", "--max_epoch 4", "--asr_tag", "other")
    assert "ERROR (step.py)" not in done.stderr


@pytest.mark.parametrize("item", ["train", "train=librispeech", "train=nobody:x"])
def test_bad_sets_are_refused(tmp_path: Path, item: str) -> None:
    done = run_sh("--prepare", item, "--datadir", str(tmp_path), "--stop_stage", "1")
    assert done.returncode == 2 and f"--prepare '{item}'" in done.stdout


LOGMEL = "--asr_config conf/train_asr_logmel.yaml"
FROZEN = "--asr_config conf/train_asr_spear_frozen.yaml"
DRY = "--dry_run true"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (f"{FROZEN} {DRY}", "student with --ckpt"),
        (f"{FROZEN} --ckpt none.pth", "none.pth"),
        (
            f"--search beam --inference_config none.yaml {DRY}",
            "none.yaml: no such file",
        ),
        (f"{LOGMEL} --asr_args '--nonsense 1'", "unrecognized arguments: --nonsense 1"),
        (
            f"{LOGMEL} --asr_args '--optim_conf rl=1' {DRY}",
            "unexpected keyword argument 'rl'",
        ),
        (f"{LOGMEL} --inference_asr_model valid.acc.best.pth", "to be used later"),
        # Its criterion is not the default's.
        ("--asr_config conf/train_asr_spear_librispeech_ctc.yaml", "valid.total_count"),
    ],
)
def test_what_stops_a_later_stage_stops_the_run(
    tmp_path: Path, options: str, message: str
) -> None:
    """In a dry run, too, where only the student may be yet to be pre-trained."""
    done = run_sh(*folders(tmp_path), *shlex.split(options))
    text = done.stdout + done.stderr
    assert done.returncode == 1 and message in text
    assert "Stage 1" not in text and not list(tmp_path.iterdir())


def test_every_gpu_gets_a_process(tmp_path: Path) -> None:
    """By Slurm, with a stand-in of sbatch that leaves a model and runs nothing."""
    write_tokens(tmp_path)
    for name in ("en_train", "en_dev"):
        (tmp_path / "dump/raw" / name).mkdir(parents=True)
        (tmp_path / "dump/raw" / name / "wav.scp").touch()
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$@" >{tmp_path}/args\n'
        f"for exp in {tmp_path}/exp/*; do touch $exp/valid.cer_ctc.ave.pth; done\n"
    )
    sbatch.chmod(0o755)
    options = ["--stage", "3", "--stop_stage", "3", "--ngpu", "8", "--nj", "32"]
    options += ["--asr_config", "conf/train_asr_logmel.yaml"]
    options += folders(tmp_path)
    path = f"{tmp_path}:{os.environ['PATH']}"
    for nodes in ("1", "2"):
        exp = tmp_path / f"exp/asr_t{nodes}"
        more = ["--num_nodes", nodes, "--asr_tag", f"t{nodes}"]
        env = {"PATH": path, "cmd_backend": "slurm", "OMP_NUM_THREADS": "3"}
        done = run_sh(*options, *more, **env)
        assert done.returncode == 0, done.stdout + done.stderr
        script = (exp / "train.log.sbatch").read_text()
        assert " env OMP_NUM_THREADS=3 " in script  # what it was before
        assert "--ngpu 8 --multiprocessing_distributed true" in script
        args = (tmp_path / "args").read_text().splitlines()
        assert {"--gres=gpu:8", "--cpus-per-task=32"} <= set(args)
        assert ("--nodes=2" in args) == (nodes == "2")
    assert " srun " in script and "--dist_launcher slurm" in script
    assert f"--dist_init_method file://{exp}/.dist_init." in script

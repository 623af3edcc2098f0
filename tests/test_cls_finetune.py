"""Fine-tuning on ESC-50 and AudioSet (egs2/spear/cls1/finetune.sh)."""

import json
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from conftest import ROOT
from data_dirs import espnet_data, write_dir
from recipe_scripts import RECIPES, folders, run_script
from student_files import write_student

from espnet2_spear.fileio.datadir import DataDirError, Entry, write_table

finetune = partial(run_script, "cls1/finetune.sh")
sys.path.insert(0, str(RECIPES / "cls1/local"))
import cls_score  # noqa: E402
import cls_sets  # noqa: E402
from asr_score import ScoreError  # noqa: E402

SOUNDS = {"low": 200, "high": 3000}  # Hz


def tone(frequency: float, seed: int) -> np.ndarray:
    """A second of a tone in some noise, (16000,)."""
    rng = np.random.default_rng(seed)
    phase = 2 * np.pi * frequency * np.arange(16000) / 16000
    return 0.2 * np.sin(phase) + 0.02 * rng.standard_normal(16000)


@pytest.fixture
def esc50(tmp_path: Path) -> Path:
    """ESC-50 with two categories and four clips a fold."""
    root = tmp_path / "ESC 50"
    (root / "audio").mkdir(parents=True)
    (root / "meta").mkdir()
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in range(1, 6):
        for i in range(4):
            name = ["low", "high"][i % 2]
            file = f"{fold}-{1000 + i}-A-{i % 2}.wav"
            soundfile.write(
                root / "audio" / file, tone(SOUNDS[name] * 1.1**i, 10 * fold + i), 16000
            )
            rows.append(f"{file},{fold},{i % 2},{name},False,{1000 + i},A")
    (root / "meta/esc50.csv").write_text("\n".join(rows) + "\n")
    return root


def test_esc50_is_learnt(tmp_path: Path, esc50: Path) -> None:
    pytest.importorskip("torcheval")
    ckpt = write_student(tmp_path / "student")
    quick = "--encoder_conf arch=tiny --encoder_conf freeze_steps=0 --max_epoch 3 "
    quick += "--encoder_conf lr_scale=1.0 --num_iters_per_epoch 8 --batch_bins 130000 "
    quick += "--num_workers 0 --use_amp false --scheduler_conf warmup_batches=4 "
    quick += "--use_tensorboard false --use_matplotlib false"
    options = ["--setting", "esc50", "--fold", "2", "--partial", "true", "--nj", "1"]
    options += ["--ckpt", str(ckpt), "--ngpu", "0", "--cls_args", quick]
    options += folders(tmp_path)
    done = finetune(*options, ESC50=str(esc50))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    exp = tmp_path / "exp/cls_esc50_fold2"
    found = json.loads((exp / "score.json").read_text())["sets"]["esc50_fold2"]
    assert found["clips"] == 4 and found["classes"] == 2
    assert found["accuracy"] == 100.0 and found["mAP"] == 100.0
    text = (exp / "RESULTS.md").read_text()
    assert "- espnet version" in text and "|esc50_fold2|4|2|100.0|100.0|" in text
    train = tmp_path / "dump/raw/esc50_fold2_train"
    labels = (train / "labels").read_text().splitlines()
    assert len(labels) == 16 and labels[0] == "esc50-1-1000-A-0 low"
    tokens = (tmp_path / "data/token_list/esc50_fold2.txt").read_text().split()
    assert tokens == ["high", "low", "<unk>"]
    # The student was where training began.
    assert "student:encoder" in (exp / "train.log").read_text()
    again = finetune(*options, "--stage", "2", ESC50=str(esc50))
    assert again.returncode == 0 and again.stdout.count("options: skipped") == 5
    # Figures of another student are not its own: it would not even be trained.
    other = ["--ckpt", str(write_student(tmp_path / "other", seed=2))]
    refused = finetune(*options, *other, "--stage", "3", ESC50=str(esc50))
    assert refused.returncode != 0 and "give another --tag" in refused.stderr


TWO_MILLION = ["--setting", "audioset2m", "--ngpu", "0", "--ckpt", "CKPT"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*TWO_MILLION, "--config", "no.yaml"], "No such file: no.yaml"),
        ([*TWO_MILLION, "--cls_args", "--nonsense 1"], "arguments: --nonsense 1"),
        ([*TWO_MILLION, "--cls_args", "--encoder_conf arch=base"], "pth:student:enc"),
        (TWO_MILLION, "pip install torcheval"),
    ],
)
def test_what_stops_a_later_stage_stops_the_run(
    tmp_path: Path, options: list[str], message: str
) -> None:
    """Before a clip is formatted."""
    env = {}
    if "CKPT" in options:
        ckpt = str(write_student(tmp_path / "student"))
        options = [ckpt if word == "CKPT" else word for word in options]
    if "torcheval" in message:
        (tmp_path / "torcheval.py").write_text("raise ImportError('not there')")
        env = {"PYTHONPATH": str(tmp_path)}
    done = finetune(*options, *folders(tmp_path), **env)
    text = done.stdout + done.stderr
    assert done.returncode != 0 and re.search(message, text), text
    assert "Stage 1" not in done.stdout and not (tmp_path / "dump").exists()


def test_dry_run_lists_what_is_not_there_yet(tmp_path: Path) -> None:
    options = ["--setting", "audioset2m", "--dry_run", "true", "--num_nodes", "2"]
    options += ["--ckpt", str(tmp_path / "later.pth"), "--ngpu", "8", "--nj", "32"]
    done = finetune(*options, *folders(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for part in (
        "Stage 5: ",
        f"reads   {tmp_path}/later.pth (not there yet)",
        # A process a GPU, not threads of one (DataParallel).
        "--ngpu 8 --multiprocessing_distributed true --resume true",
        "--dist_launcher slurm "
        f"--dist_init_method file://{tmp_path}/exp/cls_audioset2m/.dist_init.",
        "--gpu 8 --num_nodes 2 --num_threads 32 ",
    ):
        assert part in done.stdout, part
    assert list(tmp_path.iterdir()) == []


def write_set(folder: Path, labels: dict[str, str]) -> Path:
    """Write a formatted set of tones and, beside it, the labels of its corpus."""
    found = []
    for i, (utt, names) in enumerate(sorted(labels.items())):
        sound = sum(tone(SOUNDS.get(name, 800), i) for name in names.split())
        (folder / "wav").mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"wav/{utt}.wav", sound, 16000)
        found.append(Entry(utt, f"{folder}/wav/{utt}.wav", utt, samples=16000))
    write_dir(folder, found)
    path = folder.with_suffix(".labels")
    # Labels of clips that formatting left out do not matter.
    lines = {**labels, "a-gone": "low", "zz-gone": "unheard"}
    write_table(path, lines)
    return path


def prepare(folder: Path, labels: dict[str, str], *options: str) -> None:
    path = write_set(folder, labels)
    tokens = folder.parent / "classes"
    command = ["--labels", str(path), "--set_dir", str(folder), *options]
    cls_sets.main([*command, "--token_list", str(tokens)])


MANY = {f"u{i:02d}": "low" for i in range(30)} | {"u30": "high", "u31": "high low"}


def test_labels_of_sets(tmp_path: Path) -> None:
    prepare(tmp_path / "train", MANY, "--train")
    assert (tmp_path / "classes").read_text() == "high\nlow\n<unk>\n"
    lines = (tmp_path / "train/category2utt").read_text().splitlines()
    assert lines[0] == "high u30 u31" and lines[1].split()[-1] == "u31"
    prepare(tmp_path / "test", {"v": "high"})
    assert (tmp_path / "test/labels").read_text() == "v high\n"
    for raw in (tmp_path / "train", tmp_path / "test"):  # cls.sh reads text
        assert (raw / "text").read_text() == (raw / "labels").read_text()
    with pytest.raises(DataDirError, match="'w' has the label 'bell', which is not in"):
        prepare(tmp_path / "other", {"w": "low bell"})
    assert not (tmp_path / "other/labels").exists()
    (tmp_path / "test.labels").write_text("u low\n")
    command = ["--set_dir", str(tmp_path / "test"), "--token_list", "x", "--train"]
    with pytest.raises(DataDirError, match="has no label of 'v'"):
        cls_sets.main([*command, "--labels", str(tmp_path / "test.labels")])


def test_audioset_mixes_and_draws_rare_classes_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration for two million clips, on 32: two epochs, in this process."""
    pytest.importorskip("torcheval")
    from espnet2.layers.mixup_augmentation import MixupAugment
    from espnet2.train.dataset import ESPnetDataset

    from espnet2_spear.bin.cls_train import main

    prepare(tmp_path / "train", MANY, "--train")
    prepare(tmp_path / "test", {"v0": "high", "v1": "low"})
    drawn: Counter[str] = Counter()
    mixed: list[float] = []
    get, mix = ESPnetDataset.__getitem__, MixupAugment.forward

    def counted(self: ESPnetDataset, utt: str) -> object:
        drawn[utt] += 1
        return get(self, utt)

    def watched(self: MixupAugment, speech, onehot, lengths):  # noqa: ANN001, ANN202
        result = mix(self, speech, onehot, lengths)
        mixed.append(float((result[1] % 1 > 0).any(dim=1).float().mean()))
        return result

    monkeypatch.setattr(ESPnetDataset, "__getitem__", counted)
    monkeypatch.setattr(MixupAugment, "forward", watched)
    ckpt = write_student(tmp_path / "student")
    options = ["--config", str(ROOT / "conf/train_cls_spear_audioset2m.yaml")]
    options += ["--output_dir", str(tmp_path / "exp"), "--max_epoch", "2"]
    options += ["--keep_nbest_models", "2"]
    options += ["--token_list", str(tmp_path / "classes"), "--num_workers", "0"]
    options += ["--encoder_conf", "arch=tiny", "--encoder_conf", "freeze_steps=1"]
    options += ["--batch_bins", "256000", "--num_iters_per_epoch", "3"]
    options += ["--use_amp", "false", "--use_tensorboard", "false", "--ngpu", "0"]
    options += ["--use_matplotlib", "false"]
    options += ["--init_param", f"{ckpt}:student:encoder"]
    for part, name in (("train", "train"), ("valid", "test")):
        raw = tmp_path / name
        files = {
            "speech": (raw / "wav.scp", "sound"),
            "label": (raw / "labels", "text"),
        }
        options += espnet_data(files, raw / "utt2num_samples", [part])
    main(cmd=options)
    assert (tmp_path / "exp/2epoch.pth").exists()
    assert (tmp_path / "exp/valid.total_count.ave_2best.pth").exists()
    train = {utt: n for utt, n in drawn.items() if utt.startswith("u")}
    # A quarter each of the draws; of the others a sixtieth.
    rare = train["u30"] + train["u31"]
    assert 0.3 < rare / sum(train.values()) < 0.7
    assert len(mixed) == 6 and 0.05 < np.mean(mixed) < 0.6
    written = yaml.safe_load((tmp_path / "exp/config.yaml").read_text())
    assert written["token_list"] == ["high", "low", "<unk>"]


def test_scores(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "classes").write_text("a\nb\nc\n<unk>\n")
    (tmp_path / "labels").write_text("u1 a\nu2 b\nu3 a\n")
    scores = tmp_path / "score"
    scores.write_text("u1 0.9 0.1 0.0\nu2 0.6 0.3 0.1\nu3 0.5 0.2 0.3\n")
    cmd = ["--exp_dir", str(tmp_path), "--token_list", str(tmp_path / "classes")]
    cmd += ["--score_set", "test", str(tmp_path / "labels"), str(scores)]
    cls_score.main(cmd)
    found = json.loads((tmp_path / "score.json").read_text())["sets"]["test"]
    # Of a: u1 (right), u2 (wrong), u3 (right): (1 + 2/3) / 2; of b: all right.
    assert found["accuracy"] == pytest.approx(200 / 3)
    assert found["mAP"] == pytest.approx(100 * ((1 + 2 / 3) / 2 + 1) / 2)
    assert (found["clips"], found["classes"]) == (3, 2)
    (tmp_path / "labels").write_text("u1 a b\nu2 b\nu3 a\n")
    cls_score.main(cmd)
    assert "|test|3|2||" in (tmp_path / "RESULTS.md").read_text()
    for labels, text, message in (
        ("u1 a\nu2 b\nu4 a\n", None, "other utterances than .*, e.g. 'u3'"),
        ("u1 a\nu2 d\nu3 a\n", None, "'u2' has the label 'd'"),
        ("u1 a\nu2 b\nu3 a\n", "u1 1 2 3\nu2 0\nu3 1 2 3\n", "'u2' has 1 scores for 3"),
    ):
        (tmp_path / "labels").write_text(labels)
        if text:
            scores.write_text(text)
        with pytest.raises(ScoreError, match=message):
            cls_score.main(cmd)

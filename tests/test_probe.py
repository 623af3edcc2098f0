"""The probe for sound events (egs2/spear/cls1) on miniatures and made-up features."""

import io
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from espnet2_spear.fileio.datadir import DataDir, DataDirError
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import ZipformerConfig

CLS = Path(__file__).resolve().parent.parent / "egs2/spear/cls1"
sys.path.insert(0, str(CLS / "local"))
import containers  # noqa: E402
import features  # noqa: E402
import mix_clips  # noqa: E402
import probe  # noqa: E402
import sounds  # noqa: E402


def sound(seconds: float = 0.3, kind: str = "WAV", seed: int = 0) -> bytes:
    noise = np.random.default_rng(seed).uniform(-0.3, 0.3, round(seconds * 16000))
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, 16000, format=kind)
    return buffer.getvalue()


def write_cat(path: Path, entries: list[tuple[str, bytes]]) -> None:
    head, body = b"", b""
    for caption, content in entries:
        offset = 8 * len(entries) + len(body)
        flag = 0x80000000 if not head else 0
        head += struct.pack("<II", offset | flag, len(content))
        text = caption.encode() + b"\0"
        body += bytes([len(text)]) + text + content + b"\0\3abc"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + body)


def write_sf3(path: Path, samples: list[tuple[str, bytes]], pad: bool = False) -> None:
    def chunk(tag: bytes, content: bytes) -> bytes:
        filler = b"\0" * (len(content) % 2) if pad else b""
        return tag + struct.pack("<I", len(content)) + content + filler

    smpl, headers = b"", b""
    for name, content in [*samples, ("EOS", b"")]:
        fields = (len(smpl), len(smpl) + len(content), 0, 0, 44100, 60, 0, 0, 17)
        headers += containers._SHDR.pack(name.encode(), *fields)
        smpl += content
    lists = chunk(b"LIST", b"INFO" + chunk(b"INAM", b"odd"))
    lists += chunk(b"LIST", b"sdta" + chunk(b"smpl", smpl))
    lists += chunk(b"LIST", b"pdta" + chunk(b"shdr", headers))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(chunk(b"RIFF", b"sfbk" + lists))


# --- Containers and clips -------------------------------------------------------------


def test_sounds_of_openttd(tmp_path: Path) -> None:
    entries = [('"Old bus start". By A.', sound()), ("Cow", sound(0.2))]
    write_cat(tmp_path / "a.cat", entries)
    assert list(containers.read_cat(tmp_path / "a.cat")) == entries
    content = (tmp_path / "a.cat").read_bytes()
    (tmp_path / "a.cat").write_bytes(content[:-4000])
    with pytest.raises(containers.ContainerError, match="entry 1 holds no WAV"):
        list(containers.read_cat(tmp_path / "a.cat"))
    (tmp_path / "a.cat").write_bytes(b"abc")
    with pytest.raises(containers.ContainerError, match="is cut off"):
        list(containers.read_cat(tmp_path / "a.cat"))


@pytest.mark.parametrize("pad", [False, True])
def test_samples_of_a_soundfont(tmp_path: Path, pad: bool) -> None:
    samples = [("Piano A0(R)", sound(0.1, "OGG")), ("Kick 1", sound(0.2, "OGG"))]
    path = tmp_path / "a.sf3"
    write_sf3(path, samples, pad)
    assert list(containers.read_sf3(path)) == samples
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(containers.ContainerError, match="is cut off"):
        list(containers.read_sf3(path))
    write_sf3(path, [("Sine", b"RIFFxxxx")])
    with pytest.raises(containers.ContainerError, match="'Sine.*is no Ogg"):
        list(containers.read_sf3(path))
    path.write_bytes(b"no soundfont at all")
    with pytest.raises(containers.ContainerError, match="is no soundfont"):
        list(containers.read_sf3(path))


def test_clips_of_the_packages(tmp_path: Path) -> None:
    root = tmp_path / "root"

    def put(name: str, seconds: float = 0.3) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sound(seconds))

    for label in (*sounds.UFOAI, "ugv"):
        put(f"ufoai/sound/{label}/a.wav")
        put(f"ufoai/sound/{label}/deep/b.wav")
    for name in ("bd_haus", "drum_roll", "ambi_choir", "loop_amen"):
        put(f"usr/share/sonic-pi/samples/{name}.wav")
    put("usr/share/asterisk/moh/long.wav", 100)
    put("usr/share/asterisk/moh/short.wav", 9)
    for voice in sounds.VOICES:
        for name in ("hello", "digits/5", "silence/1", "beeperr"):
            put(f"usr/share/asterisk/sounds/{voice}/{name}.wav")
    captions = ['"Old bus start". By A.', '"Train/ship breakdown". B', '"Cow". C']
    captions += ['"Plane wheels touching ground". D', '"Modern car horn". E']
    cat = root / "usr/share/games/openttd/baseset/opensfx/opensfx.cat"
    write_cat(cat, [(caption, sound()) for caption in captions])
    names = ["Piano C1(R)", "Piano C1(L)", "Violin A", "Std Kick", "Sine Wave"]
    font = root / "usr/share/sounds/sf3/MuseScore_General_Lite.sf3"
    write_sf3(font, [(name, sound(0.3, "OGG")) for name in names])
    out = tmp_path / "out"
    sounds.main(["--root", str(root), "--out_dir", str(out), "--max_clips", "9"])
    data = DataDir.load(out)
    data.validate(require=("utt2domain",))
    labels = dict(line.split() for line in (out / "labels").read_text().splitlines())
    groups = dict(line.split() for line in (out / "groups").read_text().splitlines())
    counts = {label: list(labels.values()).count(label) for label in labels.values()}
    assert counts == {
        **dict.fromkeys(sounds.UFOAI, 2),
        "drum": 3,
        "music": 8,
        "speech": 9,  # of 10
        "vehicle": 4,
        "instrument": 3,
    }
    assert set(labels) == set(groups) == set(data.utterances)
    assert len({g for utt, g in groups.items() if labels[utt] == "music"}) == 1
    instruments = [g for utt, g in groups.items() if labels[utt] == "instrument"]
    assert sorted(instruments) == ["sf3-piano", "sf3-piano", "sf3-violin"]
    piece = data.segments["moh-long-3"]
    assert (piece.start, piece.end) == (37.5, 47.5)
    # With animals, impacts and doors; an animal in two colours is one group.
    for label in sounds.UFOAI_SMALL:
        put(f"ufoai/sound/{label}/a.wav")
    for name in ("birds/owl", "birds/owl_desc", "pig", "pig_golden", "pig_desc_fr"):
        put(f"usr/share/tuxpaint/stamps/animals/{name}.wav")
    out = tmp_path / "all"
    sounds.main(["--root", str(root), "--out_dir", str(out), "--all_classes"])
    labels = dict(line.split() for line in (out / "labels").read_text().splitlines())
    assert {"impact", "doors"} < set(labels.values())
    animals = {utt for utt, label in labels.items() if label == "animal"}
    assert animals == {"tuxpaint-owl", "tuxpaint-pig", "tuxpaint-pig_golden"}
    groups = dict(line.split() for line in (out / "groups").read_text().splitlines())
    assert groups["tuxpaint-pig_golden"] == groups["tuxpaint-pig"]


# --- Features -------------------------------------------------------------------------


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    for name, seconds in (("short", 0.2), ("long", 11.0)):
        (tmp_path / f"{name}.wav").write_bytes(sound(seconds))
    scp = tmp_path / "wav.scp"
    lines = [f"{name} {tmp_path / name}.wav\n" for name in ("long", "short")]
    scp.write_text("".join(lines))
    return scp


def test_features_of_every_system(tmp_path: Path, clips: Path) -> None:
    model = SpearEncoder(ZipformerConfig.from_name("tiny"))
    state = {f"student.{k}": v for k, v in model.state_dict().items()}
    torch.save(state, tmp_path / "m.pth")
    config = {"student": "tiny", "student_conf": model.config.to_dict()}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "t.yaml").write_text(
        f"teacher: spear\nteacher_conf: {{weights: {tmp_path / 'm.pth'}, layer: 2}}\n"
    )

    def run(system: str, path: str = "", seed: int = 0) -> np.ndarray:
        output = tmp_path / f"{system}{seed}.npz"
        cmd = ["--system", system, "--wav_scp", str(clips), "--output", str(output)]
        features.main([*cmd, "--path", str(tmp_path / path), "--seed", str(seed)])
        utts, values = probe.read_features(output)
        assert utts == ["long", "short"] and np.isfinite(values).all()
        return values

    assert run("logmel").shape == (2, 1, 256)
    student = run("student", "m.pth")
    assert student.shape == (2, 3, 64)
    torch.testing.assert_close(run("teacher", "t.yaml")[:, 0], student[:, 1])
    random = [run("random", "m.pth", seed) for seed in (0, 1)]
    assert random[0].shape == student.shape
    assert not np.allclose(random[0], random[1]) and not np.allclose(random[0], student)
    np.testing.assert_array_equal(run("random", "m.pth"), random[0])


def test_pooling() -> None:
    layer = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    np.testing.assert_allclose(features.pool([layer, layer + 1])[1], [3, 1, 1, 0])


# --- Probe ----------------------------------------------------------------------------


def made_up(tmp_path: Path, multi_label: bool = False) -> list[str]:
    """120 clips of 3 classes in 40 groups; layer 2 knows them, layer 1 is noise."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, 120)
    groups = 3 * (np.arange(120) // 9) + classes
    known = np.eye(3)[classes]
    if multi_label:
        known[::5, 0] = 1
    names = [f"u{i:03d}" for i in range(120)]
    labels = [" ".join(f"c{k}" for k in np.flatnonzero(row)) for row in known]
    noise = rng.standard_normal((120, 2, 8))
    noise[:, 1, :3] += 4 * known
    np.savez(tmp_path / "good.npz", utts=np.array(names), features=noise)
    noise = rng.standard_normal((120, 1, 8))
    for seed in (0, 1):
        path = tmp_path / f"bad{seed}.npz"
        np.savez(path, utts=np.array(names), features=noise + seed)
    for name, values in (("labels", labels), ("groups", groups)):
        lines = [f"{utt} {value}\n" for utt, value in zip(names, values, strict=True)]
        (tmp_path / name).write_text("".join(lines))
    return names


@pytest.mark.parametrize("multi_label", [False, True])
def test_probe_finds_the_layer_that_knows(tmp_path: Path, multi_label: bool) -> None:
    made_up(tmp_path, multi_label)
    probe.main(
        ["--labels", str(tmp_path / "labels"), "--groups", str(tmp_path / "groups")]
        + ["--seeds", "0", "1", "--output", str(tmp_path / "R.md"), "--features"]
        + [f"good one={tmp_path}/good.npz", f"noise={tmp_path}/bad{{seed}}.npz"]
    )
    results = json.loads((tmp_path / "R.json").read_text())
    for score in results["good one"]:
        assert score["layer"] == 2
        assert score["mean_average_precision"] > 95
        assert (score["accuracy"] is None) == multi_label
    for score in results["noise"]:
        assert score["mean_average_precision"] < 75
    text = (tmp_path / "R.md").read_text()
    assert "| system | layer | accuracy, % | mAP, % | mAP over good one |" in text
    differences = [
        b["mean_average_precision"] - a["mean_average_precision"]
        for a, b in zip(results["good one"], results["noise"], strict=True)
    ]
    assert f"{sum(differences) / 2:.1f} ± " in text
    assert "| good one | 2 | " in text and " ± " in text
    assert "## Environments" in text and "120 clips" in text


@pytest.mark.parametrize("multi_label", [False, True])
def test_splits_divide_no_group(tmp_path: Path, multi_label: bool) -> None:
    names = made_up(tmp_path, multi_label)
    task = probe.Task.read(tmp_path / "labels", tmp_path / "groups", names)
    assert task.multi_label == multi_label
    rows = np.arange(len(names))
    seen = []
    for seed in (0, 1):
        for train, test in probe.splits(task, rows, 5, seed):
            assert not set(task.groups[train]) & set(task.groups[test])
            assert sorted([*train, *test]) == rows.tolist()
            seen.append(tuple(sorted(test)))
    assert seen[0] != seen[5]  # the seed counts


def test_parts_of_a_corpus_are_its_splits(tmp_path: Path) -> None:
    names = made_up(tmp_path)
    path, rows = tmp_path / "splits", np.arange(len(names))

    def read(*parts: str) -> probe.Task:
        lines = [f"{u} {parts[i % len(parts)]}\n" for i, u in enumerate(names)]
        path.write_text("".join(lines))
        return probe.Task.read(tmp_path / "labels", None, names, path)

    # Folds: each is the test once, and of the others each what is chosen by.
    task = read("fold1", "fold2", "fold3", "fold4", "fold5")
    trials = list(probe.trials(task, 0))
    assert [name for name, *_ in trials] == [f"fold{i}" for i in range(1, 6)]
    for i, (_, train, test, inner) in enumerate(trials):
        assert test.tolist() == rows[i::5].tolist()
        assert sorted([*train, *test]) == rows.tolist() and len(inner) == 4
        held_out = np.concatenate([b for _, b in inner])
        assert sorted(held_out.tolist()) == train.tolist()
        assert all(not set(a) & set(b) for a, b in inner)
    # Training, validation and test, as VoxCeleb1 has them.
    ((_, train, test, ((a, b),)),) = probe.trials(read("train", "valid", "test"), 0)
    assert (a.tolist(), b.tolist()) == (train.tolist(), rows[1::3].tolist())
    assert train.tolist() == rows[::3].tolist() and test.tolist() == rows[2::3].tolist()
    ((_, train, _, inner),) = probe.trials(read("balanced_train", "eval"), 0)
    assert train.tolist() == rows[::2].tolist() and len(inner) == probe.INNER_FOLDS
    for parts in (("fold1", "fold2"), ("test",), ("valid", "test")):
        with pytest.raises(DataDirError, match=f"has the parts .*{parts[0]}"):
            read(*parts)
    path.write_text("u000 fold1\n")
    with pytest.raises(DataDirError, match="splits: no part of 'u001'"):
        probe.Task.read(tmp_path / "labels", None, names, path)


def test_probe_on_folds(tmp_path: Path) -> None:
    names = made_up(tmp_path)
    lines = [f"{utt} fold{i % 3 + 1}\n" for i, utt in enumerate(names)]
    (tmp_path / "splits").write_text("".join(lines))
    probe.main(
        ["--labels", str(tmp_path / "labels"), "--splits", str(tmp_path / "splits")]
        + ["--seeds", "0", "--output", str(tmp_path / "R.md"), "--features"]
        + [f"good={tmp_path}/good.npz"]
    )
    scores = json.loads((tmp_path / "R.json").read_text())["good"]
    assert [score["held_out"] for score in scores] == ["fold1", "fold2", "fold3"]
    assert all(score["layer"] == 2 and score["accuracy"] > 90 for score in scores)
    text = (tmp_path / "R.md").read_text()
    assert "parts: fold1 40, fold2 40, fold3 40" in text and " ± " in text


def test_probe_wants_labels_of_the_same_clips(tmp_path: Path) -> None:
    names = made_up(tmp_path)
    with pytest.raises(DataDirError, match="no label .or group. of 'u999'"):
        probe.Task.read(tmp_path / "labels", None, [*names, "u999"])
    with pytest.raises(DataDirError, match="two classes at least"):
        lines = (tmp_path / "labels").read_text().splitlines()
        one = [line.split()[0] for line in lines if line.endswith(" c1")]
        probe.Task.read(tmp_path / "labels", None, one)
    other = np.load(tmp_path / "good.npz")
    path = tmp_path / "other.npz"
    np.savez(path, utts=other["utts"][::-1], features=other["features"])
    cmd = ["--labels", str(tmp_path / "labels"), "--output", str(tmp_path / "R.md")]
    cmd += ["--seeds", "0", "--features", f"a={tmp_path}/good.npz", f"b={path}"]
    with pytest.raises(DataDirError, match="is of other clips"):
        probe.main(cmd)


def test_recipe_lists_what_it_would_do(tmp_path: Path) -> None:
    options = ["--dry_run", "true", "--ckpt", "exp/my_student/x.pth", "--expdir"]
    result = subprocess.run(
        [CLS / "run.sh", *options, tmp_path], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for name in ("logmel", "random_s0", "random_s2", "student", "yamnet"):
        assert f"{tmp_path}/my_student/features/{name}.npz" in result.stdout
    assert "'student, random weights=" in result.stdout
    assert list(tmp_path.iterdir()) == []
    result = subprocess.run([CLS / "run.sh"], capture_output=True, text=True)
    assert result.returncode == 2 and "--ckpt is needed" in result.stdout


def test_recipe_on_own_clips(tmp_path: Path) -> None:
    """Stages 2 to 4: tones against noise, which anything tells apart."""
    rng = np.random.default_rng(0)
    clips, labels = DataDir(wav_scp={}, utt2spk={}), {}
    for index in range(30):
        utt, label = f"u{index:02d}", "tone" if index % 2 else "noise"
        wave = 0.1 * rng.standard_normal(8000)
        if label == "tone":
            wave = 0.3 * np.sin(np.arange(8000) * (0.1 + 0.01 * index))
        soundfile.write(tmp_path / f"{utt}.wav", wave, 16000)
        clips.wav_scp[utt] = str(tmp_path / f"{utt}.wav")
        clips.utt2spk[utt] = utt
        clips.utt2domain[utt] = "audio"
        labels[utt] = label
    clips.write(tmp_path / "toy")
    lines = [f"{utt} {label}\n" for utt, label in labels.items()]
    (tmp_path / "toy/labels").write_text("".join(lines))
    model = SpearEncoder(ZipformerConfig.from_name("tiny"))
    state = {f"student.{k}": v for k, v in model.state_dict().items()}
    (tmp_path / "ckpt").mkdir()
    torch.save(state, tmp_path / "ckpt/m.pth")
    config = {"student": "tiny", "student_conf": model.config.to_dict()}
    (tmp_path / "ckpt/config.yaml").write_text(yaml.safe_dump(config))
    result = subprocess.run(
        [CLS / "run.sh", "--data_dir", tmp_path / "toy", "--seeds", "0", "--nj", "1"]
        + ["--ckpt", tmp_path / "ckpt/m.pth", "--teachers", "", "--tag", "t"]
        + ["--dumpdir", tmp_path / "dump", "--expdir", tmp_path / "exp"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    scores = json.loads((tmp_path / "exp/t/RESULTS.json").read_text())
    assert list(scores) == [
        "log-mel",
        "student, random weights",
        "student, pre-trained",
    ]
    assert scores["log-mel"][0]["accuracy"] == 100
    assert (
        "30 clips; majority 50.0 %: noise 15, tone 15"
        in (tmp_path / "exp/t/RESULTS.md").read_text()
    )


def test_mixtures(tmp_path: Path) -> None:
    """Two labels each, of one block each, and no group in two blocks."""
    labels, groups, scp = {}, {}, ""
    for i in range(60):
        utt = f"u{i:02d}"
        labels[utt], groups[utt] = "abc"[i % 3], f"g{i // 6}-{i % 3}"
        (tmp_path / f"{utt}.wav").write_bytes(sound(0.2 + 0.1 * (i % 4), seed=i))
        scp += f"{utt} {tmp_path}/{utt}.wav\n"
    (tmp_path / "wav.scp").write_text(scp)
    for name, table in (("labels", labels), ("groups", groups)):
        lines = [f"{utt} {value}\n" for utt, value in table.items()]
        (tmp_path / name).write_text("".join(lines))
    cmd = ["--wav_scp", str(tmp_path / "wav.scp"), "--labels", str(tmp_path / "labels")]
    cmd += ["--groups", str(tmp_path / "groups"), "--out_dir", str(tmp_path / "mix")]
    mix_clips.main([*cmd, "--num_blocks", "5"])
    data = DataDir.load(tmp_path / "mix")
    data.validate(require=("utt2domain",))
    rows = [line.split() for line in (tmp_path / "mix/labels").read_text().splitlines()]
    assert len(rows) == 60
    block_of = mix_clips.blocks_of(labels, groups, 5, 0)
    new_groups = (tmp_path / "mix/groups").read_text()
    for utt, *both in rows:
        first = utt.split("-")[1]
        assert len(set(both)) == 2 and labels[first] in both
        assert f"{utt} block{block_of[first]:02d}\n" in new_groups
    for group in set(groups.values()):
        blocks = {block_of[utt] for utt in groups if groups[utt] == group}
        assert len(blocks) == 1
    samples, rate = soundfile.read(data.wav_scp[rows[0][0]])
    assert rate == 16000 and 10 ** (-32 / 20) < np.sqrt(np.mean(samples**2)) < 0.2
    task = probe.Task.read(tmp_path / "mix/labels", None, [row[0] for row in rows])
    assert task.multi_label

"""The probe for speakers (egs2/spear/spk1): voices out of a game's archive."""

import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from espnet2_spear.fileio.datadir import DataDir, DataDirError, read_table

SPK = Path(__file__).resolve().parent.parent / "egs2/spear/spk1"
sys.path.insert(0, str(SPK / "local"))
import data_fotaq  # noqa: E402
import voxceleb_layout  # noqa: E402


def clip(seconds: float = 1.5, seed: int = 0) -> bytes:
    noise = np.random.default_rng(seed).uniform(-0.3, 0.3, round(seconds * 11025))
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, 11025, format="MP3")
    return buffer.getvalue()


def dialogue(key: int) -> bytes:
    return bytes(20) + struct.pack(">hhh", -3, 7, key) + bytes(40)


def write_archive(root: Path, members: dict[str, bytes], compression: int = 1) -> Path:
    path = root / data_fotaq.ARCHIVE
    path.parent.mkdir(parents=True, exist_ok=True)
    offset = 15 + 21 * len(members)
    head = b"QTBLCEM10\0\0\0" + struct.pack(">BH", compression, len(members))
    body = b""
    for name, content in members.items():
        place = offset + len(body)
        head += struct.pack(">12sBII", name.encode(), 1, place, len(content))
        body += content
    path.write_bytes(head + body)
    return path


@pytest.fixture(scope="module")
def members() -> dict[str, bytes]:
    sounds = [clip(seed=seed) for seed in range(3)]
    found = {"BOB2.DOG": dialogue(6), "WITCH1.DOG": dialogue(60), "A.PCX": b"x"}
    for i in range(5):
        found[f"06000{i}P1.SB"] = sounds[i % 3]  # Bob
        found[f"06000{i}J1.SB"] = sounds[i % 3]  # the player, to Bob
        found[f"60000{i}P1.SB"] = sounds[i % 3]
        found[f"60000{i}P2.SB"] = sounds[i % 3]
    found["060009P1.SB"] = clip(0.3)  # too short
    found["990000P1.SB"] = sounds[0]  # of no dialogue
    found["C18A0001.SB"] = sounds[0]  # of a cut-scene
    return found


def test_voices(tmp_path: Path, members: dict[str, bytes]) -> None:
    write_archive(tmp_path, members)
    cmd = ["--root", str(tmp_path), "--out_dir", str(tmp_path / "d"), "--num_clips"]
    data_fotaq.main([*cmd, "5"])
    data = DataDir.load(tmp_path / "d")
    data.validate(require=("utt2domain",))
    labels = read_table(tmp_path / "d/labels", "utterance label")
    groups = read_table(tmp_path / "d/groups", "utterance group")
    assert sorted(labels.values()) == ["BOB"] * 5 + ["JOE"] * 5 + ["WITCH"] * 5
    assert labels["JOE-060003J1"] == "JOE" and labels["BOB-060003P1"] == "BOB"
    assert groups["JOE-060003J1"] == groups["BOB-060003P1"] == "060003"
    assert soundfile.info(data.wav_scp["BOB-060001P1"]).samplerate == 11025
    with pytest.raises(DataDirError, match="fewer than two speakers have 11 clips"):
        data_fotaq.main([*cmd, "11"])


def test_damaged_archives(tmp_path: Path, members: dict[str, bytes]) -> None:
    path = write_archive(tmp_path, members)
    content = path.read_bytes()
    for damaged, match in (
        (content[:2000], "is cut off"),
        (content[:100], "is cut off"),
        (b"RIFF" + content, "is not the game's archive"),
        (b"", "is not the game's archive"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataDirError, match=match):
            list(data_fotaq.read_clips(path))
    path = write_archive(tmp_path, members, compression=3)
    with pytest.raises(DataDirError, match="not MP3 but kind 3"):
        list(data_fotaq.read_clips(path))
    with pytest.raises(DataDirError, match="no such file; run stage 1"):
        list(data_fotaq.read_clips(tmp_path / "none"))


def test_voxceleb_layout(tmp_path: Path) -> None:
    """What s3prl's downstream reads: its paths, its numbers of speakers, its splits."""
    tables: dict[str, str] = {"wav.scp": "", "labels": "", "groups": ""}
    for i in range(40):
        soundfile.write(tmp_path / f"{i}.wav", np.full(100, 0.5), 16000)
        tables["wav.scp"] += f"u{i:02d} {tmp_path}/{i}.wav\n"
        tables["labels"] += f"u{i:02d} {'bob' if i % 2 else 'ann'}\n"
        tables["groups"] += f"u{i:02d} g{i // 2}\n"
    for name, text in tables.items():
        (tmp_path / name).write_text(text)
    cmd = []
    for name in ("wav_scp", "labels", "groups"):
        cmd += [f"--{name}", str(tmp_path / name.replace("_scp", ".scp"))]
    voxceleb_layout.main([*cmd, "--out_dir", str(tmp_path / "out")])
    splits: dict[str, set[str]] = {}
    for line in (tmp_path / "out/splits.txt").read_text().splitlines():
        number, name = line.split()
        assert (tmp_path / "out/dev/wav" / name).exists()
        speaker, group, file = name.split("/")
        odd = int(file[1:3]) % 2
        assert speaker == ("id10002" if odd else "id10001")
        splits.setdefault(group, set()).add(number)
    assert all(len(numbers) == 1 for numbers in splits.values())
    assert set.union(*splits.values()) == {"1", "2", "3"}


def test_recipe_lists_what_it_would_do(tmp_path: Path) -> None:
    options = ["--dry_run", "true", "--ckpt", "exp/my_student/x.pth", "--expdir"]
    result = subprocess.run(
        [SPK / "run.sh", *options, tmp_path], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for name in ("logmel", "random_s0", "random_s2", "student", "yamnet"):
        assert f"{tmp_path}/my_student/features/{name}.npz" in result.stdout
    assert "local/data_fotaq.py" in result.stdout
    result = subprocess.run([SPK / "run.sh"], capture_output=True, text=True)
    assert result.returncode == 2 and "--ckpt is needed" in result.stdout

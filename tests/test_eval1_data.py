"""The clips of the benchmark of frozen features: containers, packages, mixtures."""

import io
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT
from data_dirs import read_dir

from espnet2_spear.fileio.datadir import DataDirError, read_table, write_table

sys.path.insert(0, str(ROOT / "egs2/spear/eval1/local"))
import containers  # noqa: E402
import data_festvox  # noqa: E402
import data_fotaq  # noqa: E402
import data_hedgewars  # noqa: E402
import data_instruments  # noqa: E402
import data_opensfx  # noqa: E402
import mix_clips  # noqa: E402
import sounds  # noqa: E402
import voxceleb_layout  # noqa: E402


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


def chunk(tag: bytes, content: bytes, pad: bool = False) -> bytes:
    filler = b"\0" * (len(content) % 2) if pad else b""
    return tag + struct.pack("<I", len(content)) + content + filler


def write_sf3(
    path: Path,
    samples: list[tuple[str, bytes]],
    pad: bool = False,
    players: dict[tuple[int, int], list[int]] | None = None,
) -> None:
    """A soundfont; players: (bank, program) -> samples, each by its own instrument.

    Sample i has the MIDI key 30 + 12 i.
    """
    smpl, headers = b"", b""
    for i, (name, content) in enumerate([*samples, ("EOS", b"")]):
        key = 30 + 12 * i
        fields = (len(smpl), len(smpl) + len(content), 0, 0, 44100, key, 0, 0, 17)
        headers += containers._SHDR.pack(name.encode(), *fields)
        smpl += content
    hydra = {tag: b"" for tag in (b"phdr", b"pbag", b"pgen", b"inst", b"ibag", b"igen")}
    zones = 0
    for index, ((bank, program), used) in enumerate((players or {}).items()):
        hydra[b"phdr"] += containers._PHDR.pack(b"p", program, bank, index, 0, 0, 0)
        hydra[b"pbag"] += struct.pack("<HH", 2 * index, 0)
        hydra[b"pgen"] += struct.pack("<HHHH", 43, 7, 41, index)
        hydra[b"inst"] += containers._INST.pack(b"i", zones)
        for number in used:
            hydra[b"ibag"] += struct.pack("<HH", zones, 0)
            hydra[b"igen"] += struct.pack("<HH", 53, number)
            zones += 1
    count = len(players or {})
    hydra[b"phdr"] += containers._PHDR.pack(b"EOP", 0, 0, count, 0, 0, 0)
    hydra[b"pbag"] += struct.pack("<HH", 2 * count, 0)
    hydra[b"inst"] += containers._INST.pack(b"EOI", zones)
    hydra[b"ibag"] += struct.pack("<HH", zones, 0)
    hydra[b"shdr"] = headers
    pdta = b"".join(chunk(tag, content, pad) for tag, content in hydra.items())
    lists = chunk(b"LIST", b"INFO" + chunk(b"INAM", b"odd", pad), pad)
    lists += chunk(b"LIST", b"sdta" + chunk(b"smpl", smpl, pad), pad)
    lists += chunk(b"LIST", b"pdta" + pdta, pad)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(chunk(b"RIFF", b"sfbk" + lists, pad))


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
    keyed = [(name, key, s) for (name, s), key in zip(samples, (30, 42), strict=True)]
    assert list(containers.read_sf3(path)) == keyed
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
    data = read_dir(out, "utt2domain")
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
    assert set(labels) == set(groups) == set(data)
    assert len({g for utt, g in groups.items() if labels[utt] == "music"}) == 1
    instruments = [g for utt, g in groups.items() if labels[utt] == "instrument"]
    assert sorted(instruments) == ["sf3-piano", "sf3-piano", "sf3-violin"]
    piece = data["moh-long-3"].segment
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


def test_families_of_a_soundfont(tmp_path: Path) -> None:
    """Samples of one family, held out by program; those of several are left out."""
    samples = [(f"s{i}", sound(0.2, "OGG", seed=i)) for i in range(6)]
    players = {(0, 0): [0, 1], (0, 40): [1, 2, 3], (8, 42): [3], (128, 0): [4]}
    path = tmp_path / sounds.SOUNDFONT
    write_sf3(path, samples, players=players)
    assert containers.read_presets(path) == {
        0: {(0, 0)},
        1: {(0, 0), (0, 40)},
        2: {(0, 40)},
        3: {(0, 40), (8, 42)},
        4: {(128, 0)},
    }
    cmd = ["--root", str(tmp_path), "--out_dir", str(tmp_path / "d")]
    data_instruments.main([*cmd, "--min_clips", "1"])
    labels = read_table(tmp_path / "d/labels", "utterance label")
    assert labels == {
        "sf3-0000": "piano",
        "sf3-0002": "strings",
        "sf3-0003": "strings",
        "sf3-0004": "drums",
    }
    groups = read_table(tmp_path / "d/groups", "utterance group")
    assert groups["sf3-0003"] == "program-40" and groups["sf3-0004"] == "drums-0"
    # Keys 30, 54 and 66; the lowest octave takes in what is below it.
    cmd[-1] = str(tmp_path / "octaves")
    data_instruments.main([*cmd, "--label", "octave", "--min_clips", "1"])
    assert read_table(tmp_path / "octaves/labels", "utterance label") == {
        "sf3-0000": "octave2",
        "sf3-0002": "octave3",
        "sf3-0003": "octave4",
    }
    write_sf3(path, samples, players={(0, 0): [0]})
    content = path.read_bytes()
    path.write_bytes(content.replace(b"igen", b"xgen"))
    with pytest.raises(containers.ContainerError, match="damaged.*unpack it again"):
        containers.read_presets(path)


def test_phrases_that_all_voices_say(tmp_path: Path) -> None:
    folder = tmp_path / data_hedgewars.VOICES
    for index, voice in enumerate(data_hedgewars.ENGLISH):
        for phrase in ("Hello", "Fire", f"only{index}"):
            (folder / voice).mkdir(parents=True, exist_ok=True)
            (folder / voice / f"{phrase}.ogg").write_bytes(sound(0.1, "OGG"))
    cmd = ["--root", str(tmp_path), "--out_dir", str(tmp_path / "d")]
    data_hedgewars.main(cmd)
    labels = read_table(tmp_path / "d/labels", "utterance label")
    assert len(labels) == 20 and set(labels.values()) == {"Hello", "Fire"}
    groups = read_table(tmp_path / "d/groups", "utterance group")
    assert set(groups.values()) == set(data_hedgewars.ENGLISH)
    for path in (folder / "Robot").iterdir():
        path.unlink()
    with pytest.raises(DataDirError, match="Robot: no .ogg files; run stage 1"):
        data_hedgewars.main(cmd)


def test_phones_of_a_voice(tmp_path: Path) -> None:
    voice = tmp_path / "root" / data_festvox.VOICE
    for name in ("lab", "wav"):
        (voice / name).mkdir(parents=True)
    command = ["--root", str(tmp_path / "root"), "--out_dir", str(tmp_path / "out")]
    with pytest.raises(DataDirError, match="lab: no labels; run stage 1"):
        data_festvox.main(command)
    for i in range(9):
        lab = voice / f"lab/ru_{i:04d}.lab"
        lab.write_text(f"#\n 0.20000 125 pau\n 0.3{i}000 125 ay\n")
    data_festvox.main(command)
    assert read_table(tmp_path / "out/phones", "utterance phones") == {
        f"ru_000{i}": f"pau 0.200 ay 0.3{i}0" for i in (0, 4, 8)
    }
    assert read_dir(tmp_path / "out")["ru_0004"].path.endswith("ru_0004.wav")
    for text in ("0.2 125 pau\n", "#\n", "#\n0.2 pau\n"):
        lab.write_text(text)
        with pytest.raises(DataDirError, match="ru_0008.lab: expected 'end colour ph"):
            data_festvox.main(command)


def test_noise(tmp_path: Path) -> None:
    write_cat(tmp_path / sounds.OPENSFX, [("Cow", sound()), ("Bus", sound(0.2))])
    data_opensfx.main(["--root", str(tmp_path), "--out_dir", str(tmp_path / "d")])
    data = read_dir(tmp_path / "d", "utt2domain")
    assert soundfile.info(data["opensfx-01"].path).frames == 3200


def test_mixtures(tmp_path: Path) -> None:
    """Two labels each, of clips of one part."""
    labels, groups, parts, wavs = {}, {}, {}, {}
    for i in range(60):
        utt = f"u{i:02d}"
        labels[utt], groups[utt] = "abc"[i % 3], f"g{i // 6}-{i % 3}"
        parts[groups[utt]] = ("train", "train", "dev", "test")[i // 6 % 4]
        wavs[utt] = str(tmp_path / f"{utt}.wav")
        (tmp_path / f"{utt}.wav").write_bytes(sound(0.2 + 0.1 * (i % 4), seed=i))
    (tmp_path / "source").mkdir()
    tables = {"wav.scp": wavs, "source/labels": labels, "source/groups": groups}
    for name, content in (tables | {"splits": parts}).items():
        write_table(tmp_path / name, content)
    cmd = [f"--wav_scp={tmp_path}/wav.scp", f"--source={tmp_path}/source"]
    cmd += [f"--splits={tmp_path}/splits", f"--out_dir={tmp_path}/mix"]
    mix_clips.main(cmd)
    data = read_dir(tmp_path / "mix", "utt2domain")
    mixed = read_table(tmp_path / "mix/labels", "utterance labels")
    new_parts = read_table(tmp_path / "mix/splits", "utterance part")
    assert len(mixed) == 60
    for utt, both in mixed.items():
        first = utt.removeprefix("mix-")
        assert len(set(both.split())) == 2 and labels[first] in both.split()
        assert new_parts[utt] == parts[groups[first]]
    samples, rate = soundfile.read(data["mix-u00"].path)
    assert rate == 16000 and 10 ** (-32 / 20) < np.sqrt(np.mean(samples**2)) < 0.2
    parts.pop("g0-0")
    write_table(tmp_path / "splits", parts)
    with pytest.raises(DataDirError, match="no label or part of 'u00'"):
        mix_clips.main(cmd)


# --- Speakers -------------------------------------------------------------------------


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
    data = read_dir(tmp_path / "d", "utt2domain")
    labels = read_table(tmp_path / "d/labels", "utterance label")
    groups = read_table(tmp_path / "d/groups", "utterance group")
    assert sorted(labels.values()) == ["BOB"] * 5 + ["JOE"] * 5 + ["WITCH"] * 5
    assert labels["JOE-060003J1"] == "JOE" and labels["BOB-060003P1"] == "BOB"
    assert groups["JOE-060003J1"] == groups["BOB-060003P1"] == "060003"
    assert soundfile.info(data["BOB-060001P1"].path).samplerate == 11025
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


def test_dev_and_test_sounds_are_not_trained_on() -> None:
    """Of the packages that ssl1 trains on; voices have other prefixes there."""
    ssl1 = ROOT / "egs2/spear/ssl1/local"
    held = {
        line.split()[0]
        for name in ("held_out", "split_en_dev", "split_en_test")
        for line in (ssl1 / f"{name}.txt").read_text().splitlines()
    }
    voices = {"en_US_f_Allison": "en_allison", "es_MX_f_Allison": "es_allison"}
    voices |= {"fr_CA_f_June": "fr_june", "it_IT_m_Carlo": "it_carlo"}
    voices |= {"ru_RU_f_IvrvoiceRU": "ru_ivrvoiceru"}
    lines = (ROOT / "egs2/spear/eval1/splits/classes.txt").read_text().splitlines()
    count = 0
    for name, part in map(str.split, lines):
        package, _, stem = name.partition("-")
        if part == "train" or package not in {"ufoai", "sonicpi", "moh", *voices}:
            continue
        count += 1
        if package in voices:
            assert any(
                utt.startswith(voices[package]) and utt.endswith(f"-{stem}")
                for utt in held
            ), name
        else:
            assert name.replace("/", "-") in held
    assert count == 187

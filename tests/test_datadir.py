"""Kaldi data directories: round trip, order, consistency, joining."""

from dataclasses import replace
from pathlib import Path

import pytest

from espnet2_spear.fileio.datadir import DataDir, DataDirError, Segment, combine


@pytest.fixture
def data() -> DataDir:
    return DataDir(
        wav_scp={"r1": "/a b/r1.wav", "r2": "r2.flac"},
        segments={
            "s1-u1": Segment("r1", 0.0, 1.5),
            "s1-u2": Segment("r1", 1.5, 2.000125),
            "s2-u3": Segment("r2", 0.0, -1.0),
        },
        utt2spk={"s2-u3": "s2", "s1-u2": "s1", "s1-u1": "s1"},
        utt2domain={"s1-u1": "speech", "s1-u2": "speech", "s2-u3": "audio"},
        text={"s1-u1": "GR\u00dcSSE AUS K\u00d6LN", "s1-u2": ""},
        utt2num_samples={"s1-u1": 24000, "s1-u2": 8002, "s2-u3": 7},
    )


def test_round_trip(tmp_path: Path, data: DataDir) -> None:
    data.write(tmp_path / "x")
    back = DataDir.load(tmp_path / "x")
    assert back == replace(data, path=tmp_path / "x")
    back.validate(require=("utt2domain", "utt2num_samples"))
    spk2utt = (tmp_path / "x" / "spk2utt").read_text()
    assert spk2utt == "s1 s1-u1 s1-u2\ns2 s2-u3\n"


def test_files_are_sorted_as_in_the_c_locale(tmp_path: Path) -> None:
    ids = ["b", "B", "a-1", "a1", "\u00e9", "a_1"]
    DataDir(wav_scp={i: "f" for i in ids}, utt2spk={i: i for i in ids}).write(tmp_path)
    lines = (tmp_path / "wav.scp").read_bytes().splitlines()
    assert lines == sorted(lines) and len(lines) == len(ids)


def test_rewriting_removes_files_no_longer_needed(
    tmp_path: Path, data: DataDir
) -> None:
    data.write(tmp_path)
    DataDir(wav_scp={"u": "f"}, utt2spk={"u": "s"}).write(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "spk2utt",
        "utt2spk",
        "wav.scp",
    ]


def test_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    (tmp_path / "wav.scp").write_bytes(b"u caf\xe9.wav\n")
    (tmp_path / "utt2spk").write_text("u s\n")
    DataDir.load(tmp_path).write(tmp_path / "copy")
    assert (tmp_path / "copy/wav.scp").read_bytes() == b"u caf\xe9.wav\n"


def test_select_keeps_only_what_is_needed(data: DataDir) -> None:
    part = data.select(["s1-u2"])
    part.validate(require=("utt2domain", "utt2num_samples", "text"))
    assert part.utterances == ["s1-u2"] and list(part.wav_scp) == ["r1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("wav.scp", "r1 a.wav\nr2 b.wav\nr1 c.wav\n", "wav.scp, line 3: 'r1' appears"),
        ("utt2spk", "s1-u1 s1\ns1-u2 s1\n", "utt2spk: 1 utterances are missing.*s2-u3"),
        ("utt2spk", "s1-u1 s1\ns1-u2\n", "utt2spk, line 2: expected"),
        (
            "utt2spk",
            "s1-u1 s\ns1-u2 s\ns2-u3 s\ns4 s\n",
            "utt2spk: 1 utterances are in no other file, e.g. 's4'",
        ),
        ("wav.scp", "r1 a.wav\n", "wav.scp: 1 recordings are missing, e.g. 'r2'"),
        ("wav.scp", "r1 cat x |\nr2 b\n", "wav.scp: 'r1' is a command"),
        ("segments", "s1-u1 r1 0 x\n", "segments: the line of utterance 's1-u1'"),
        (
            "segments",
            "s1-u1 r1 2 1\ns1-u2 r1 1 2\ns2-u3 r2 0 -1\n",
            "goes from 2.0 to 1.0 s",
        ),
        ("utt2domain", "s1-u1 speech\n", "utt2domain: 2 utterances are missing"),
        (
            "utt2domain",
            "s1-u1 speech\ns1-u2 music\ns2-u3 audio\n",
            "domain 'music'; the domains are speech and audio",
        ),
        ("utt2num_samples", "s1-u1 1.5\n", "'1.5' instead of a number"),
        ("text", "s9 A\n", "text: 1 utterances are in no other file, e.g. 's9'"),
    ],
)
def test_inconsistent_directories(
    tmp_path: Path, data: DataDir, name: str, content: str, message: str
) -> None:
    data.write(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataDirError, match=message) as error:
        DataDir.load(tmp_path).validate()
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["wav.scp", "utt2spk"])
def test_missing_files(tmp_path: Path, data: DataDir, name: str) -> None:
    data.write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataDirError, match=f"{name}: cannot be read"):
        DataDir.load(tmp_path)


def test_requirements_and_empty_sets(data: DataDir) -> None:
    with pytest.raises(DataDirError, match="text: 1 utterances are missing.*s2-u3"):
        data.validate(require=("text",))
    with pytest.raises(DataDirError, match="no utterances"):
        data.select([]).validate()
    slash = DataDir(wav_scp={"a/b": "f"}, utt2spk={"a/b": "s"})
    with pytest.raises(DataDirError, match="'a/b' cannot name a file"):
        slash.validate()


def test_combine(data: DataDir) -> None:
    other = DataDir(
        wav_scp={"r3": "x"},
        segments={"s3-u": Segment("r3", 0.0, 1.0)},
        utt2spk={"s3-u": "s3"},
        utt2domain={"s3-u": "audio"},
    )
    both = combine([data, other])
    both.validate(require=("utt2domain",))
    assert both.utterances == ["s1-u1", "s1-u2", "s2-u3", "s3-u"]
    with pytest.raises(DataDirError, match="is in both"):
        combine([data, data])
    with pytest.raises(DataDirError, match="with and without segments"):
        combine([data, DataDir(wav_scp={"u": "f"}, utt2spk={"u": "s"})])

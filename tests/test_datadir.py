"""Kaldi data directories and tables: round trip, order, consistency."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from data_dirs import write_dir

from espnet2_spear.fileio import external_sorter
from espnet2_spear.fileio.datadir import (
    RAW,
    Entry,
    Segment,
    check,
    entries,
    write_entries,
    write_table,
)
from espnet2_spear.fileio.external_sorter import ExternalSorter
from espnet2_spear.fileio.tables import DataDirError, Lines, join


@pytest.fixture
def data() -> list[Entry]:
    first = Entry(
        *("s1-u1", "/a b/r1.wav", "s1", "speech", Segment("r1", 0.0, 1.5)),
        text="GR\u00dcSSE AUS K\u00d6LN",
        samples=24000,
    )
    second = first._replace(
        utt="s1-u2", segment=Segment("r1", 1.5, 2.000125), text="", samples=8002
    )
    last = Segment("r2", 0.0, -1.0)
    return [first, second, Entry("s2-u3", "r2.flac", "s2", "audio", last, samples=7)]


def test_round_trip(tmp_path: Path, data: list[Entry]) -> None:
    assert write_entries(data, tmp_path) == 3
    assert list(entries(tmp_path, ("utt2domain", "utt2num_samples"))) == data
    spk2utt = (tmp_path / "spk2utt").read_text()
    assert spk2utt == "s1 s1-u1 s1-u2\ns2 s2-u3\n"


def test_sorted_entries_are_in_the_order_of_the_c_locale(tmp_path: Path) -> None:
    ids = ["b", "B", "a-1", "a1", "\u00e9", "a_1"]
    write_dir(tmp_path, [Entry(utt, "f", "s") for utt in ids])
    lines = (tmp_path / "wav.scp").read_bytes().splitlines()
    assert lines == sorted(lines) and len(lines) == len(ids)


def test_rewriting_removes_files_no_longer_needed(
    tmp_path: Path, data: list[Entry]
) -> None:
    write_entries(data, tmp_path)
    write_entries([Entry("u", "f", "s")], tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "spk2utt",
        "utt2spk",
        "wav.scp",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("wav.scp", "r1 a.wav\nr2 b.wav\nr1 c.wav\n", "wav.scp: 'r1' appears twice"),
        ("utt2spk", "s1-u1 s1\ns1-u2 s1\n", "utt2spk: utterance 's2-u3' is missing"),
        ("utt2spk", "s1-u1 s1\ns1-u2\n", "utt2spk, line 2: expected"),
        (
            "utt2spk",
            "s1-u1 s\ns1-u2 s\ns2-u3 s\ns4 s\n",
            "utt2spk: utterance 's4' is in no other file",
        ),
        ("wav.scp", "r1 a.wav\n", "recording 'r2' of utterance 's2-u3' is missing"),
        ("wav.scp", "r1 cat x |\nr2 b\n", "wav.scp: 'r1' is a command"),
        ("segments", "s1-u1 r1 0 x\n", "segments: the line of utterance 's1-u1'"),
        (
            "segments",
            "s1-u1 r1 2 1\ns1-u2 r1 1 2\ns2-u3 r2 0 -1\n",
            "goes from 2.0 to 1.0 s",
        ),
        ("utt2domain", "s1-u1 speech\n", "utt2domain: utterance 's1-u2' is missing"),
        (
            "utt2domain",
            "s1-u1 speech\ns1-u2 music\ns2-u3 audio\n",
            "domain 'music'; the domains are speech and audio",
        ),
        ("utt2num_samples", "s1-u1 1.5\n", "'1.5' instead of a number"),
        ("text", "s9 A\n", "text: utterance 's9' is in no other file"),
    ],
)
def test_inconsistent_directories(
    tmp_path: Path, data: list[Entry], name: str, content: str, message: str
) -> None:
    write_entries(data, tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataDirError, match=message) as error:
        check(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["wav.scp", "utt2spk"])
def test_missing_files(tmp_path: Path, data: list[Entry], name: str) -> None:
    write_entries(data, tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataDirError, match=f"{name}: cannot be read"):
        check(tmp_path)


def test_requirements_and_empty_sets(tmp_path: Path, data: list[Entry]) -> None:
    write_entries([Entry("a/b", "f", "s")], tmp_path)
    with pytest.raises(DataDirError, match="'a/b' cannot name a file"):
        check(tmp_path)
    write_entries(data, tmp_path)
    with pytest.raises(DataDirError, match="text: utterance 's2-u3' is missing"):
        check(tmp_path, require=("text",))
    (tmp_path / "text").unlink()
    with pytest.raises(DataDirError, match="text: utterance 's1-u1' is missing"):
        check(tmp_path, require=("text",))
    for name in ("segments", "wav.scp", "utt2spk", "utt2domain", "utt2num_samples"):
        (tmp_path / name).write_text("")
    with pytest.raises(DataDirError, match="no utterances"):
        check(tmp_path)


# --- Streamed -------------------------------------------------------------------------


@pytest.fixture
def small_sorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorters that write to disk, and merge, after a few rows."""
    monkeypatch.setattr(external_sorter, "ROWS", 3)
    monkeypatch.setattr(external_sorter, "RUNS", 2)
    monkeypatch.setattr(external_sorter, "_BLOCK", 2)


@pytest.mark.usefixtures("small_sorter")
@pytest.mark.parametrize("count", [0, 2, 3, 50])
def test_sorting_on_disk(tmp_path: Path, count: int) -> None:
    order = np.random.default_rng(0).permutation(count)
    rows = [(f"k{i // 2}", int(i)) for i in order]
    with ExternalSorter(folder=tmp_path) as rows_on_disk:
        for row in rows:
            rows_on_disk.add(row)
        assert len(rows_on_disk) == count
        # Stable, and as often as wanted.
        expected = sorted(rows, key=lambda row: row[0].encode())
        assert list(rows_on_disk) == expected and list(rows_on_disk) == expected
        # Levels of at most one run each, the rest in memory.
        files = [p for p in tmp_path.rglob("*") if p.is_file()]
        assert len(files) == (count // 3).bit_count()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small_sorter")
def test_tables_need_not_be_sorted(tmp_path: Path, data: list[Entry]) -> None:
    write_entries(data, tmp_path / "x")
    for name in ("wav.scp", "segments", "utt2spk", "text"):
        path = tmp_path / "x" / name
        path.write_text("".join(reversed(path.read_text().splitlines(True))))
    assert list(entries(tmp_path / "x")) == data


def test_streamed_names_that_are_not_utf8(tmp_path: Path) -> None:
    lines = sorted([b"u\xf0\x9f\x98\x80", b"u\xef\xbf\xbd", b"uz"])
    (tmp_path / "wav.scp").write_bytes(b"".join(u + b" a \xe9.wav\n" for u in lines))
    (tmp_path / "utt2spk").write_bytes(b"".join(u + b" s\n" for u in lines))
    write_entries(entries(tmp_path), tmp_path / "copy")
    for name in ("wav.scp", "utt2spk"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / name).read_bytes()
    for name in ("wav.scp", "utt2spk"):
        (tmp_path / name).write_bytes(b"u\xe9 x\n")
    with pytest.raises(DataDirError, match="id 'u.udce9' is not UTF-8"):
        check(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("my file", "a.ark:8", "key 'my file' has white space"),
        ("tab\there", "a.ark:8", "has white space"),
        ("", "a.ark:8", "or is empty"),
        ("a", "b\nc", "has a line break"),
    ],
)
def test_lines_that_would_be_read_as_others(
    tmp_path: Path, key: str, value: str, message: str
) -> None:
    with pytest.raises(DataDirError, match=message):
        write_table(tmp_path / "table", {"other": 1, key: value})
    assert not (tmp_path / "table").exists()


def test_writing_streams(tmp_path: Path) -> None:
    segment = Segment("r", 0.0, 1.0)
    a = Entry("a", "1.wav", "s", "speech")
    for second, message in (
        (a._replace(path="2.wav"), "id 'a' is in both 1.wav and 2.wav; give"),
        (a._replace(utt="b", segment=segment), "with and without segments: 1.wav, 1"),
    ):
        with pytest.raises(DataDirError, match=message):
            write_entries([a, second], tmp_path)
        assert not list(tmp_path.iterdir())  # nothing half-written
    pieces = [a._replace(utt=utt, segment=segment) for utt in "ab"]
    pieces[1] = pieces[1]._replace(path="2.wav")
    with pytest.raises(DataDirError, match="id 'r' is in both 1.wav and 2.wav"):
        write_entries(pieces, tmp_path)
    with pytest.raises(ValueError, match="a after b"):
        write_entries([a._replace(utt="b"), a], tmp_path)


def test_lines_are_found_by_key_or_place(tmp_path: Path) -> None:
    keys = [f"k{i:03d}" for i in range(40)]
    (tmp_path / "t").write_text("".join(f"{key} v {key}\n" for key in keys[::2]))
    (tmp_path / "u").write_text("".join(f"{key} v {key}\n" for key in keys[38::-2]))
    for name in "tu":
        table = Lines.by_key(tmp_path / name, "key value")
        for i in np.random.default_rng(0).permutation(40):
            assert table.find(keys[i]) == (None if i % 2 else f"v {keys[i]}")
        assert table.find("") is table.find("z") is None
    assert Lines(tmp_path / "u").at(24) == ("k034", "v k034")
    (tmp_path / "t").write_text("")
    assert Lines(tmp_path / "t").find("k000") is None


def test_tables_are_joined_by_their_keys() -> None:
    first, second = [("B", 1), ("a", 2)], [("B", 3), ("C", 4)]
    assert list(join(first, second, ())) == [
        ("B", [("B", 1), ("B", 3), None]),
        ("C", [None, ("C", 4), None]),
        ("a", [("a", 2), None, None]),
    ]


def test_memory_does_not_grow_with_utterances(tmp_path: Path) -> None:
    """Of reading and writing, beyond a first block; dictionaries took 1 kB each."""

    def made(count: int) -> Iterator[Entry]:
        for i in range(count):
            segment = Segment(f"r{i // 50:06d}", 0.5, 1.0)
            path = f"/corpora/some/where/{segment.recording}.flac"
            yield Entry(f"r-u{i:07d}", path, f"r-u{i:07d}", "speech", segment, "WORDS")

    def peak(count: int) -> int:
        tracemalloc.start()
        write_entries(made(count), tmp_path / "in")
        assert write_entries(entries(tmp_path / "in"), tmp_path / "out") == count
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(external_sorter, "ROWS", 200)
        patch.setattr(external_sorter, "RUNS", 8)
        patch.setattr(external_sorter, "_BLOCK", 10)
        assert peak(4000) - peak(1000) < 3000 * 20


def test_feats_type_is_of_the_last_set_written(tmp_path: Path) -> None:
    write_entries([Entry("a", "a.wav", "s")], tmp_path, RAW)
    assert (tmp_path / "feats_type").read_text() == "raw\n"
    write_entries([Entry("a", "a.wav", "s")], tmp_path)
    assert not (tmp_path / "feats_type").exists()

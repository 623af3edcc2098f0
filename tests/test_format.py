"""Formatting and filtering of data directories (stages 2 and 3)."""

import itertools
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
import soundfile
from data_dirs import Utterances, read_dir, write_dir

from espnet2_spear.bin import spear_filter, spear_format
from espnet2_spear.fileio import ark, convert
from espnet2_spear.fileio.audio import read_audio
from espnet2_spear.fileio.datadir import DataDirError, Entry, Segment


def noise(seconds: float, rate: int = 16000, channels: int = 1) -> np.ndarray:
    shape = (round(seconds * rate), channels)
    return np.random.default_rng(0).uniform(-0.3, 0.3, shape)


@pytest.fixture
def messy(tmp_path: Path) -> Utterances:
    """A data directory with every kind of bad utterance among good ones."""
    audio = tmp_path / "audio"
    audio.mkdir()
    files = {
        "good": (noise(1.0), 16000),
        "stereo": (noise(1.0, channels=2), 16000),
        "rate": (noise(1.0, 44100), 44100),
        "short": (noise(0.01), 16000),
        "long": (noise(3.0), 16000),
        "silent": (np.zeros(16000), 16000),
        "offset": (np.full(16000, 0.25), 16000),
        "faint": (noise(1.0) * 1e-3, 16000),
        "badrate": (noise(1.0), 200),
    }
    for name, (samples, rate) in files.items():
        soundfile.write(audio / f"{name}.wav", samples, rate)
    (audio / "empty.wav").touch()
    (audio / "text.wav").write_text("no audio")
    data = {
        utt: Entry(utt, f"{audio}/{utt}.wav", "s", "speech", text=f"TEXT OF {utt}")
        for utt in (*files, "empty", "text", "gone")
    }
    write_dir(tmp_path / "data", data.values())
    return data


def format_dir(tmp_path: Path, *options: str) -> Utterances:
    spear_format.main(
        ["--in_dir", str(tmp_path / "data"), "--out_dir", str(tmp_path / "org")]
        + list(options)
    )
    return read_dir(tmp_path / "org", "utt2num_samples")


def skipped(folder: Path) -> dict[str, str]:
    lines = (folder / "skipped.txt").read_text().splitlines()
    return {line.split()[0]: line.split()[1] for line in lines}


@pytest.mark.parametrize("audio_format", ["flac", "wav"])
def test_bad_utterances_are_skipped_and_listed(
    tmp_path: Path, messy: Utterances, audio_format: str
) -> None:
    format_dir(tmp_path, "--audio_format", audio_format, "--nj", "2")
    data = read_dir(tmp_path / "org", "utt2domain", "text", "utt2num_samples")
    assert skipped(tmp_path / "org") == {
        "badrate": "bad_rate",
        "empty": "empty",
        "gone": "unreadable",
        "text": "unreadable",
    }
    for entry in data.values():
        info = soundfile.info(entry.path)
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        assert info.format == audio_format.upper()
        assert info.frames == entry.samples

    spear_filter.main(
        ["--in_dir", str(tmp_path / "org"), "--out_dir", str(tmp_path / "raw")]
        + ["--max_seconds", "2"]
    )
    kept = read_dir(tmp_path / "raw", "utt2domain", "text", "utt2num_samples")
    assert list(kept) == ["good", "rate", "stereo"]
    assert skipped(tmp_path / "raw") == {
        **skipped(tmp_path / "org"),
        "short": "too_short",
        "long": "too_long",
        "silent": "silence",
        "offset": "silence",
        "faint": "silence",
    }
    assert {*kept, *skipped(tmp_path / "raw")} == set(messy)


def test_16_khz_mono_is_copied_bit_by_bit(tmp_path: Path, messy: Utterances) -> None:
    data = format_dir(tmp_path)
    before, _ = soundfile.read(messy["good"].path, dtype="int16")
    after, _ = soundfile.read(data["good"].path, dtype="int16")
    np.testing.assert_array_equal(after, before)


def test_segments_are_cut(tmp_path: Path) -> None:
    samples = noise(3.0)[:, 0]
    soundfile.write(tmp_path / "r.flac", samples, 16000)
    spans = {"s-1": (0.0, 1.25), "s-2": (1.25, -1.0), "s-3": (2.0, 9.0)}
    whole = Entry("", str(tmp_path / "r.flac"), "s")
    write_dir(
        tmp_path / "data",
        [
            whole._replace(utt=utt, segment=Segment("r", *span))
            for utt, span in spans.items()
        ],
    )
    data = format_dir(tmp_path).values()
    assert not any(entry.segment for entry in data)
    whole, _ = soundfile.read(tmp_path / "r.flac", dtype="int16")
    parts = [soundfile.read(entry.path, dtype="int16")[0] for entry in data]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert skipped(tmp_path / "org") == {"s-3": "segment_past_end"}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_killed_run_continues_to_the_same_result(
    tmp_path: Path, messy: Utterances, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spear_format, "SHARD_UTTERANCES", 2)
    format_dir(tmp_path)
    complete = contents(tmp_path / "org")
    marks = list((tmp_path / "org/.shards").rglob("*.done"))
    assert len(marks) == 6
    # As if killed: a shard without its mark, a file of another not moved into place.
    with_good = next(mark for mark in marks if '"good"' in mark.read_text())
    lost, kept = [mark for mark in marks if mark != with_good][:2]
    lost.unlink()
    Path(read_dir(tmp_path / "org")["good"].path).unlink()
    (tmp_path / "org/wav.scp").unlink()
    untouched = kept.stat().st_mtime_ns
    format_dir(tmp_path)
    assert contents(tmp_path / "org") == complete
    assert kept.stat().st_mtime_ns == untouched


def test_an_array_of_jobs_makes_the_same(
    tmp_path: Path, messy: Utterances, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spear_format, "SHARD_UTTERANCES", 2)
    format_dir(tmp_path)
    complete = contents(tmp_path / "org")
    shutil.rmtree(tmp_path / "org")
    folders = ["--in_dir", str(tmp_path / "data"), "--out_dir", str(tmp_path / "org")]
    for number in (1, 2, 3, 4):
        spear_format.main([*folders, "--part", f"{number}/4"])
        # Six shards, so two for the first and the second job.
        marks = list((tmp_path / "org/.shards").rglob("*.done"))
        assert len(marks) == (2, 4, 5, 6)[number - 1]
    assert not (tmp_path / "org/wav.scp").exists()
    with monkeypatch.context() as patch:
        patch.setattr(convert, "format_shard", None)  # nothing is left to convert
        format_dir(tmp_path)
    assert contents(tmp_path / "org") == complete


def test_damaged_audio_is_converted_again(tmp_path: Path, messy: Utterances) -> None:
    file = Path(format_dir(tmp_path)["good"].path)
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    format_dir(tmp_path)
    assert file.read_bytes() == whole


def test_changed_audio_is_converted_again(tmp_path: Path, messy: Utterances) -> None:
    assert format_dir(tmp_path)["good"].samples == 16000
    soundfile.write(messy["good"].path, noise(2.0), 16000)
    assert format_dir(tmp_path)["good"].samples == 32000


def test_other_audio_of_the_same_length_has_another_name(
    tmp_path: Path, messy: Utterances
) -> None:
    """So codes and embeddings of the recording before are not taken for its own."""
    before = format_dir(tmp_path)
    soundfile.write(messy["good"].path, -noise(1.0), 16000)
    stamp = os.stat(messy["faint"].path)
    os.utime(messy["faint"].path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    after = format_dir(tmp_path)
    assert before["good"].path != after["good"].path
    assert before["faint"].path == after["faint"].path


def test_nothing_left_is_an_error(tmp_path: Path, messy: Utterances) -> None:
    with pytest.raises(DataDirError, match="no utterance is left.*--min_seconds"):
        format_dir(tmp_path)
        spear_filter.main(
            ["--in_dir", str(tmp_path / "org"), "--out_dir", str(tmp_path / "raw")]
            + ["--min_seconds", "20"]
        )
    write_dir(tmp_path / "data", [messy["text"], messy["gone"]])
    with pytest.raises(DataDirError, match="none of its 2 utterances.*skipped.txt"):
        format_dir(tmp_path)


def test_out_dir_is_another_folder(tmp_path: Path, messy: Utterances) -> None:
    before = (tmp_path / "data/wav.scp").read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    words = ["--in_dir", str(tmp_path / "data"), "--out_dir", str(tmp_path / "link")]
    for command in (spear_format, spear_filter):
        with pytest.raises(DataDirError, match="link: is --in_dir, too"):
            command.main(words)
    assert (tmp_path / "data/wav.scp").read_bytes() == before


def test_no_space_is_an_error_not_a_skip(
    tmp_path: Path, messy: Utterances, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        format_dir(tmp_path)
    assert not list((tmp_path / "org").rglob("*.part"))


def test_duplicate_utterances_stop_before_any_work(
    tmp_path: Path, messy: Utterances
) -> None:
    with open(tmp_path / "data/wav.scp", "a") as out:
        out.write(f"good {messy['good'].path}\n")
    with pytest.raises(DataDirError, match="'good' appears twice"):
        format_dir(tmp_path)
    assert not (tmp_path / "org").exists()


def test_what_fails_is_tried_once_more(
    tmp_path: Path, messy: Utterances, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file server that fails once, at the whole file or in the midst of it."""
    read, log = convert.read_pieces, tmp_path / "tries"
    log.touch()

    def busy_at_first(path: str, spans: list, strict: bool) -> Iterator:
        name = Path(path).stem
        first = name not in log.read_text().split()
        with log.open("a") as out:  # by another process
            out.write(f"{name}\n")
        pieces = read(path, spans, strict)
        if first and name in ("good", "stereo"):
            yield from itertools.islice(pieces, len(spans) - 1)
            raise OSError(116, "Stale file handle")
        yield from pieces

    monkeypatch.setattr(convert, "read_pieces", busy_at_first)
    cut = [
        entry._replace(segment=Segment(utt, 0.0, -1.0)) for utt, entry in messy.items()
    ]
    piece = messy["good"]._replace(utt="good-2", segment=Segment("good", 0.5, 1.0))
    write_dir(tmp_path / "data", [*cut, piece])
    data = format_dir(tmp_path)
    assert data["good"].samples == data["stereo"].samples == 16000
    assert data["good-2"].samples == 8000
    reasons = skipped(tmp_path / "org")
    assert sorted(reasons) == ["badrate", "empty", "gone", "text"]
    tries = Counter(log.read_text().split())
    twice = {name for name, count in tries.items() if count == 2}
    assert twice == {*reasons, "good", "stereo"} and max(tries.values()) == 2


@pytest.mark.parametrize("audio_format", ["flac.ark", "wav.ark"])
def test_arks_hold_what_files_would(
    tmp_path: Path,
    messy: Utterances,
    monkeypatch: pytest.MonkeyPatch,
    audio_format: str,
) -> None:
    """As ESPnet's own readers take them; they are not written again."""
    files = format_dir(tmp_path)
    whole = {u: soundfile.read(e.path, dtype="int16")[0] for u, e in files.items()}
    shutil.rmtree(tmp_path / "org")
    options = ["--audio_format", audio_format]
    monkeypatch.setattr(spear_format, "SHARD_UTTERANCES", 3)
    format_dir(tmp_path, *options)
    data = read_dir(tmp_path / "org", "utt2domain", "text", "utt2num_samples")
    arks = list((tmp_path / "org").rglob("*.ark"))
    assert len(arks) < len(data) and data.keys() == files.keys()
    for utt, entry in data.items():
        rate, samples = ark.kaldi.load_mat(entry.path)
        if not isinstance(rate, int):  # the order depends on the library
            rate, samples = samples, rate
        scale = 32768 if samples.dtype.kind == "f" else 1
        np.testing.assert_array_equal(samples * scale, whole[utt])
        samples, rate = read_audio(entry.path)
        np.testing.assert_array_equal(samples * 32768, whole[utt])
    before = contents(tmp_path / "org")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "format_shard", None)
        format_dir(tmp_path, *options)
    arks[0].write_bytes(arks[0].read_bytes()[:-1] + b"x")
    format_dir(tmp_path, *options)
    assert contents(tmp_path / "org") == before
    # Formatted sets are input, too: of another run, or ESPnet's dumps.
    (tmp_path / "org").rename(tmp_path / "data2")
    moved = [e._replace(path=e.path.replace("/org/", "/data2/")) for e in data.values()]
    write_dir(tmp_path / "data", moved)
    again = format_dir(tmp_path).values()
    assert [e.samples for e in again] == [e.samples for e in data.values()]


def test_recordings_that_are_used_though_something_is_wrong(tmp_path: Path) -> None:
    samples = noise(1.0)[:, 0]
    audio = {name: tmp_path / f"{name}.wav" for name in ("a", "b", "c", "d", "e")}
    for name in ("a", "e"):
        soundfile.write(audio[name], samples, 16000)
    content = audio["a"].read_bytes()
    audio["a"].write_bytes(content[:40] + bytes(4) + content[44:])
    soundfile.write(audio["b"], np.stack([samples, -samples], 1), 16000)
    soundfile.write(audio["c"], samples * 32767, 16000, "FLOAT")
    soundfile.write(audio["d"], samples * 5, 16000, "FLOAT")
    found = [Entry(name, str(path), "s") for name, path in audio.items()]
    write_dir(tmp_path / "data", found)
    data = format_dir(tmp_path)
    assert list(data) == ["a", "b", "d", "e"]
    for name in ("a", "b", "e"):
        assert data[name].samples == 16000
        loud, _ = soundfile.read(data[name].path)
        np.testing.assert_allclose(loud, samples, atol=1e-4)
    assert skipped(tmp_path / "org") == {"c": "scale"}
    notes = (tmp_path / "org/notes.txt").read_text().splitlines()
    kinds = [tuple(line.split()[:2]) for line in notes]
    assert kinds == [("a", "length"), ("b", "one_channel"), ("d", "clipped")]
    format_dir(tmp_path, "--strict")
    assert skipped(tmp_path / "org") == {"a": "length", "c": "scale"}


def test_names_of_files_are_short_and_differ_by_more_than_case(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(0.1), 16000)
    ids = ["x" * 300, "x" * 299 + "y", "\u00e9" * 200, "case", "Case", "CASE"]
    ids += ["e\u0301", "\u00e9", "\u00c9"]  # alike on file systems of Apple
    found = [Entry(utt, str(tmp_path / "a.wav"), "s") for utt in ids]
    write_dir(tmp_path / "data", found)
    first = format_dir(tmp_path)
    names = {normalize("NFC", Path(e.path).name).casefold() for e in first.values()}
    assert len(names) == len(ids) and max(len(n.encode()) for n in names) <= 200
    assert skipped(tmp_path / "org") == {}
    assert format_dir(tmp_path) == first

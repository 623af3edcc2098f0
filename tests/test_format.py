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

from espnet2_spear.bin import spear_filter, spear_format
from espnet2_spear.fileio import ark, convert
from espnet2_spear.fileio.audio import read_audio
from espnet2_spear.fileio.datadir import DataDir, DataDirError, Segment


def noise(seconds: float, rate: int = 16000, channels: int = 1) -> np.ndarray:
    shape = (round(seconds * rate), channels)
    return np.random.default_rng(0).uniform(-0.3, 0.3, shape)


@pytest.fixture
def messy(tmp_path: Path) -> DataDir:
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
    names = [*files, "empty", "text", "gone"]
    data = DataDir(
        wav_scp={name: str(audio / f"{name}.wav") for name in names},
        utt2spk={name: "s" for name in names},
        utt2domain={name: "speech" for name in names},
        text={name: f"TEXT OF {name}" for name in names},
    )
    data.write(tmp_path / "data")
    return data


def format_dir(tmp_path: Path, *options: str) -> DataDir:
    spear_format.main(
        ["--in_dir", str(tmp_path / "data"), "--out_dir", str(tmp_path / "org")]
        + list(options)
    )
    return DataDir.load(tmp_path / "org")


def skipped(folder: Path) -> dict[str, str]:
    lines = (folder / "skipped.txt").read_text().splitlines()
    return {line.split()[0]: line.split()[1] for line in lines}


@pytest.mark.parametrize("audio_format", ["flac", "wav"])
def test_bad_utterances_are_skipped_and_listed(
    tmp_path: Path, messy: DataDir, audio_format: str
) -> None:
    data = format_dir(tmp_path, "--audio_format", audio_format, "--nj", "2")
    data.validate(require=("utt2domain", "text", "utt2num_samples"))
    assert skipped(tmp_path / "org") == {
        "badrate": "bad_rate",
        "empty": "empty",
        "gone": "unreadable",
        "text": "unreadable",
    }
    for utt, file in data.wav_scp.items():
        info = soundfile.info(file)
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        assert info.format == audio_format.upper()
        assert info.frames == data.utt2num_samples[utt]

    spear_filter.main(
        ["--in_dir", str(tmp_path / "org"), "--out_dir", str(tmp_path / "raw")]
        + ["--max_seconds", "2"]
    )
    kept = DataDir.load(tmp_path / "raw")
    kept.validate(require=("utt2domain", "text", "utt2num_samples"))
    assert kept.utterances == ["good", "rate", "stereo"]
    assert skipped(tmp_path / "raw") == {
        **skipped(tmp_path / "org"),
        "short": "too_short",
        "long": "too_long",
        "silent": "silence",
        "offset": "silence",
        "faint": "silence",
    }
    assert set(kept.utterances) | set(skipped(tmp_path / "raw")) == set(messy.wav_scp)


def test_16_khz_mono_is_copied_bit_by_bit(tmp_path: Path, messy: DataDir) -> None:
    data = format_dir(tmp_path)
    before, _ = soundfile.read(messy.wav_scp["good"], dtype="int16")
    after, _ = soundfile.read(data.wav_scp["good"], dtype="int16")
    np.testing.assert_array_equal(after, before)


def test_segments_are_cut(tmp_path: Path) -> None:
    samples = noise(3.0)[:, 0]
    soundfile.write(tmp_path / "r.flac", samples, 16000)
    DataDir(
        wav_scp={"r": str(tmp_path / "r.flac")},
        segments={
            "s-1": Segment("r", 0.0, 1.25),
            "s-2": Segment("r", 1.25, -1.0),
            "s-3": Segment("r", 2.0, 9.0),
        },
        utt2spk={"s-1": "s", "s-2": "s", "s-3": "s"},
    ).write(tmp_path / "data")
    data = format_dir(tmp_path)
    assert data.segments is None
    whole, _ = soundfile.read(tmp_path / "r.flac", dtype="int16")
    parts = [soundfile.read(data.wav_scp[u], dtype="int16")[0] for u in data.utterances]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert skipped(tmp_path / "org") == {"s-3": "segment_past_end"}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_killed_run_continues_to_the_same_result(
    tmp_path: Path, messy: DataDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    format_dir(tmp_path, "--shard_utts", "2")
    complete = contents(tmp_path / "org")
    marks = list((tmp_path / "org/.shards").rglob("*.done"))
    assert len(marks) == 6
    # As if killed: a shard without its mark, a file of another not moved into place.
    with_good = next(mark for mark in marks if '"good"' in mark.read_text())
    lost, kept = [mark for mark in marks if mark != with_good][:2]
    lost.unlink()
    Path(DataDir.load(tmp_path / "org").wav_scp["good"]).unlink()
    (tmp_path / "org/wav.scp").unlink()
    untouched = kept.stat().st_mtime_ns
    format_dir(tmp_path, "--shard_utts", "2")
    assert contents(tmp_path / "org") == complete
    assert kept.stat().st_mtime_ns == untouched


def test_an_array_of_jobs_makes_the_same(
    tmp_path: Path, messy: DataDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    format_dir(tmp_path, "--shard_utts", "2")
    complete = contents(tmp_path / "org")
    shutil.rmtree(tmp_path / "org")
    folders = ["--in_dir", str(tmp_path / "data"), "--out_dir", str(tmp_path / "org")]
    folders += ["--shard_utts", "2"]
    for number in (1, 2, 3, 4):
        spear_format.main([*folders, "--part", f"{number}/4"])
        # Six shards, so two for the first and the second job.
        marks = list((tmp_path / "org/.shards").rglob("*.done"))
        assert len(marks) == (2, 4, 5, 6)[number - 1]
    assert not (tmp_path / "org/wav.scp").exists()
    with monkeypatch.context() as patch:
        patch.setattr(convert, "format_shard", None)  # nothing is left to convert
        format_dir(tmp_path, "--shard_utts", "2")
    assert contents(tmp_path / "org") == complete


def test_damaged_audio_is_converted_again(tmp_path: Path, messy: DataDir) -> None:
    file = Path(format_dir(tmp_path).wav_scp["good"])
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    format_dir(tmp_path)
    assert file.read_bytes() == whole


def test_changed_audio_is_converted_again(tmp_path: Path, messy: DataDir) -> None:
    assert format_dir(tmp_path).utt2num_samples["good"] == 16000
    soundfile.write(messy.wav_scp["good"], noise(2.0), 16000)
    assert format_dir(tmp_path).utt2num_samples["good"] == 32000


def test_nothing_left_is_an_error(tmp_path: Path, messy: DataDir) -> None:
    with pytest.raises(DataDirError, match="no utterance is left.*--min_seconds"):
        format_dir(tmp_path)
        spear_filter.main(
            ["--in_dir", str(tmp_path / "org"), "--out_dir", str(tmp_path / "raw")]
            + ["--min_seconds", "20"]
        )
    messy.select(["text", "gone"]).write(tmp_path / "data")
    with pytest.raises(DataDirError, match="none of its 2 utterances.*skipped.txt"):
        format_dir(tmp_path)


def test_no_space_is_an_error_not_a_skip(
    tmp_path: Path, messy: DataDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        format_dir(tmp_path)
    assert not list((tmp_path / "org").rglob("*.part"))


def test_duplicate_utterances_stop_before_any_work(
    tmp_path: Path, messy: DataDir
) -> None:
    with open(tmp_path / "data/wav.scp", "a") as out:
        out.write(f"good {messy.wav_scp['good']}\n")
    with pytest.raises(DataDirError, match="'good' appears twice"):
        format_dir(tmp_path)
    assert not (tmp_path / "org").exists()


def test_what_fails_is_tried_once_more(
    tmp_path: Path, messy: DataDir, monkeypatch: pytest.MonkeyPatch
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
    messy.segments = {name: Segment(name, 0.0, -1.0) for name in messy.wav_scp}
    messy.segments["good-2"] = Segment("good", 0.5, 1.0)
    messy.utt2spk["good-2"], messy.utt2domain["good-2"] = "s", "speech"
    messy.write(tmp_path / "data")
    data = format_dir(tmp_path)
    assert data.utt2num_samples["good"] == data.utt2num_samples["stereo"] == 16000
    assert data.utt2num_samples["good-2"] == 8000
    reasons = skipped(tmp_path / "org")
    assert sorted(reasons) == ["badrate", "empty", "gone", "text"]
    tries = Counter(log.read_text().split())
    twice = {name for name, count in tries.items() if count == 2}
    assert twice == {*reasons, "good", "stereo"} and max(tries.values()) == 2


@pytest.mark.parametrize("audio_format", ["flac.ark", "wav.ark"])
def test_arks_hold_what_files_would(
    tmp_path: Path, messy: DataDir, audio_format: str
) -> None:
    """As ESPnet's own readers take them; they are not written again."""
    files = format_dir(tmp_path)
    whole = {u: soundfile.read(f, dtype="int16")[0] for u, f in files.wav_scp.items()}
    shutil.rmtree(tmp_path / "org")
    options = ["--audio_format", audio_format, "--shard_utts", "3"]
    data = format_dir(tmp_path, *options)
    data.validate(require=("utt2domain", "text", "utt2num_samples"))
    arks = list((tmp_path / "org").rglob("*.ark"))
    assert len(arks) < len(data.wav_scp) and data.utterances == files.utterances
    for utt, spec in data.wav_scp.items():
        rate, samples = ark.kaldi.load_mat(spec)
        if not isinstance(rate, int):  # the order depends on the library
            rate, samples = samples, rate
        scale = 32768 if samples.dtype.kind == "f" else 1
        np.testing.assert_array_equal(samples * scale, whole[utt])
        samples, rate = read_audio(spec)
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
    data = data.load(tmp_path / "data2")
    data.wav_scp = {u: f.replace("/org/", "/data2/") for u, f in data.wav_scp.items()}
    data.write(tmp_path / "data")
    again = format_dir(tmp_path)
    assert again.utt2num_samples == data.utt2num_samples


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
    DataDir(
        wav_scp={name: str(path) for name, path in audio.items()},
        utt2spk=dict.fromkeys(audio, "s"),
    ).write(tmp_path / "data")
    data = format_dir(tmp_path)
    assert data.utterances == ["a", "b", "d", "e"]
    for name in ("a", "b", "e"):
        assert data.utt2num_samples[name] == 16000
        loud, _ = soundfile.read(data.wav_scp[name])
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
    DataDir(
        wav_scp=dict.fromkeys(ids, str(tmp_path / "a.wav")),
        utt2spk=dict.fromkeys(ids, "s"),
    ).write(tmp_path / "data")
    first = format_dir(tmp_path).wav_scp
    names = {normalize("NFC", Path(f).name).casefold() for f in first.values()}
    assert len(names) == len(ids) and max(len(n.encode()) for n in names) <= 200
    assert skipped(tmp_path / "org") == {}
    assert format_dir(tmp_path).wav_scp == first

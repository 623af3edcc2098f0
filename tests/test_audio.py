"""Reading of audio files: formats, segments, channels and damaged files."""

import os
import re
import struct
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from espnet2_spear.fileio.audio import (
    AudioError,
    Span,
    audio_info,
    read_audio,
    read_pieces,
    resample,
    to_int16,
)
from espnet2_spear.fileio.folders import audio_files


def tone(seconds: float = 1.0, rate: int = 16000, freq: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * freq * np.arange(round(seconds * rate)) / rate)


def write_g722(path: Path, samples: np.ndarray) -> None:
    """Write float samples at 16 kHz as raw G.722."""
    with av.open(str(path), "w", format="g722") as container:
        stream = container.add_stream("g722", rate=16000)
        stream.layout = "mono"
        pcm = (samples * 32767).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout="mono")
        frame.sample_rate = 16000
        frame.time_base = Fraction(1, 16000)
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_formats_of_soundfile(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(), 16000)
    samples, rate = read_audio(path)
    assert rate == 16000 and samples.dtype == np.float32 and samples.ndim == 1
    info = audio_info(path)
    assert (info.rate, info.channels, info.samples) == (16000, 1, len(samples))
    spectrum = np.abs(np.fft.rfft(samples[:16000]))
    assert abs(int(spectrum.argmax()) - 440) <= 1


@pytest.mark.parametrize(
    ("suffix", "codec", "rate"),
    [
        *((x, "aac", 16000) for x in "aac m4a m4b m4v mp4 mov 3gp 3g2".split()),
        *((x, "mp2", 16000) for x in "mp2 mpg avi".split()),
        *(("ac3", "ac3", 48000), ("eac3", "eac3", 48000), ("tta", "tta", 16000)),
        *(("wv", "wavpack", 16000), ("mka", "flac", 16000)),
        *((x, "libopus", 48000) for x in "opus webm mkv".split()),
    ],
)
def test_what_is_read_is_found_in_folders(
    tmp_path: Path, suffix: str, codec: str, rate: int
) -> None:
    path = tmp_path / f"a.{suffix}"
    write_by_av(path, codec, tone(1.0, rate), rate)
    assert list(audio_files(tmp_path)) == [path]
    assert abs(len(read_audio(path)[0]) / rate - 1.0) < 0.15


def test_g722_by_pyav(tmp_path: Path) -> None:
    path = tmp_path / "a.g722"
    write_g722(path, tone())
    samples, rate = read_audio(path)
    assert rate == 16000 and audio_info(path).samples == len(samples)
    assert abs(len(samples) - 16000) <= 320
    spectrum = np.abs(np.fft.rfft(samples, 16000))
    assert abs(int(spectrum.argmax()) - 440) <= 1
    assert 0.4 < np.abs(samples).max() < 0.6


@pytest.mark.parametrize("suffix", ["flac", "g722"])
def test_pieces_equal_slices_of_the_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 48000)
    write_g722(path, noise) if suffix == "g722" else soundfile.write(path, noise, 16000)
    whole, _ = read_audio(path)
    pieces = list(read_pieces(path, [Span(0.5, 1.0), Span(None, 0.25), Span(2.0)]))
    expected = [whole[8000:16000], whole[:4000], whole[32000:]]
    for (piece, _), part in zip(pieces, expected, strict=True):
        np.testing.assert_array_equal(piece, part)
    assert audio_info(path).samples == pieces[-1][1].samples == len(whole)


def test_stereo_is_mixed_by_mean(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    left = tone()
    soundfile.write(path, np.stack([left, -0.5 * left], axis=1), 16000, "FLOAT")
    samples, _ = read_audio(path)
    np.testing.assert_allclose(samples, 0.25 * left, atol=1e-6)


def test_one_channel(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    left = tone()
    soundfile.write(path, np.stack([left, -0.5 * left], axis=1), 16000, "FLOAT")
    spans = [Span(0.5, 1.0, channel=1), Span(channel=2), Span(channel=0)]
    second, none, first = (piece for piece, _ in read_pieces(path, spans))
    np.testing.assert_allclose(second, -0.5 * left[8000:16000], atol=1e-6)
    np.testing.assert_allclose(first, left, atol=1e-6)
    assert none.reason == "no_channel" and "channel 2 (from 0)" in str(none)


def test_16_bit_audio_survives_bit_by_bit(tmp_path: Path) -> None:
    pcm = np.arange(-32768, 32768, dtype=np.int16)
    soundfile.write(tmp_path / "a.wav", pcm, 16000)
    samples, _ = read_audio(tmp_path / "a.wav")
    back, clipped = to_int16(samples)
    np.testing.assert_array_equal(back, pcm)
    assert clipped == 0


def test_clipping_is_counted() -> None:
    pcm, clipped = to_int16(np.array([0.0, 1.0, -1.0, 1.5, -1.5], np.float32))
    assert pcm.tolist() == [0, 32767, -32768, 32767, -32768]
    assert clipped == 3


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000])
def test_resampling_keeps_pitch_and_duration(rate: int) -> None:
    samples = resample(tone(rate=rate).astype(np.float32), rate, 16000)
    assert abs(len(samples) - 16000) <= 1
    np.testing.assert_allclose(
        samples[1000:-1000], tone()[1000:15000][:14000], atol=2e-2
    )


def test_segment_end_may_exceed_the_recording_only_slightly(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(), 16000)
    samples, _ = read_audio(path, 0.5, 1.05)
    assert len(samples) == 8000
    with pytest.raises(AudioError, match="is not inside its 1.000 s") as error:
        read_audio(path, 0.5, 1.5)
    assert error.value.reason == "segment_past_end"
    with pytest.raises(AudioError):
        read_audio(path, 2.0, None)


def test_a_bad_segment_does_not_stop_the_others(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(), 16000)
    first, second = (
        piece for piece, _ in read_pieces(path, [Span(3, 4), Span(0, 0.5)])
    )
    assert isinstance(first, AudioError)
    assert len(second) == 8000


def test_damaged_files_are_named_with_a_remedy(tmp_path: Path) -> None:
    empty = tmp_path / "empty.wav"
    empty.touch()
    header_only = tmp_path / "header.wav"
    soundfile.write(header_only, np.zeros(0), 16000)
    text = tmp_path / "text.flac"
    text.write_text("this is not audio\n" * 100)
    slow = tmp_path / "slow.wav"
    soundfile.write(slow, tone(rate=16000), 100)
    nan = tmp_path / "nan.wav"
    soundfile.write(nan, np.array([0.0, np.nan]), 16000, "FLOAT")
    raw = tmp_path / "empty.g722"
    raw.touch()
    headers = tmp_path / "headers.ogg"
    soundfile.write(headers, tone(), 16000)
    *whole, last = ogg_pages(headers.read_bytes())
    headers.write_bytes(b"".join(whole) + last[:100])
    cases = {
        headers: "empty",
        tmp_path / "none.wav": "unreadable",
        empty: "empty",
        raw: "empty",
        header_only: "empty",
        text: "unreadable",
        slow: "bad_rate",
        nan: "not_finite",
    }
    for path, reason in cases.items():
        with pytest.raises(AudioError, match="; ") as error:
            read_audio(path)
        assert error.value.reason == reason
        assert str(path) in str(error.value)
        if reason != "not_finite":
            with pytest.raises(AudioError):
                audio_info(path)


def patched(content: bytes, *patches: tuple[int, bytes]) -> bytes:
    for at, new in patches:
        content = content[:at] + new + content[at + len(new) :]
    return content


def after(content: bytes, mark: bytes) -> int:
    return content.index(mark) + len(mark)


def check_length(path: Path, samples: range, note: str = "") -> np.ndarray:
    """Check how long a recording is said to be, and return what is read of it.

    Args:
        path: of the recording.
        samples: how many there may be.
        note: what is said of the length, which is an error where one asks for that; if
            empty, nothing is.
    """
    read, info = read_audio(path)[0], audio_info(path)
    assert info.samples == len(read) and len(read) in samples
    assert re.match(f"length .*({note})", info.notes[0]) if note else not info.notes
    # What shows without decoding is said first.
    for open_it, said in ((audio_info, note), (read_audio, f"{note}|do not rise")):
        if not note:
            open_it(path, strict=True)
            continue
        with pytest.raises(AudioError, match=said) as error:
            open_it(path, strict=True)
        assert error.value.reason == "length"
    return read


def size_field(form: str) -> tuple[str, bytes]:
    """How the size of the samples is written, and the name that it follows."""
    return {
        "WAV": ("<I", b"data"),
        "W64": ("<Q", bytes.fromhex("64617461f3acd3118cd100c04f8edb8a")),
        "RF64": (
            "<Q",
            b"ds64" + (28).to_bytes(4, "little") + (64096).to_bytes(8, "little"),
        ),
        "AU": (">I", b".snd" + (24).to_bytes(4, "big")),
        "CAF": (">Q", b"data"),
        "AIFF": (">I", b"SSND"),
    }[form]


@pytest.mark.parametrize("form", ["WAV", "W64", "RF64", "AU", "CAF", "AIFF"])
@pytest.mark.parametrize("said", ["nothing", "all", "more", "less", 2, 4, 6])
def test_sizes_that_headers_get_wrong(
    tmp_path: Path, form: str, said: str | int
) -> None:
    """Recorders that were killed, pipes, and writers that count wrongly.

    Args:
        said: of the size of the samples, or bytes that it is too small.
    """
    path = tmp_path / "a.x"
    pcm = np.random.default_rng(0).integers(-9999, 9999, 32000, np.int16)
    soundfile.write(path, pcm, 16000, "PCM_16", format=form)
    content = path.read_bytes()
    field, mark = size_field(form)
    at, width = after(content, mark), struct.calcsize(field)
    (size,) = struct.unpack(field, content[at : at + width])
    wrong = {
        "nothing": 0,
        "all": 2 ** (8 * width) - 1,
        "more": size + 44,
        "less": size // 2 + 24,
        **{few: size - few for few in (2, 4, 6)},
    }[said]
    path.write_bytes(patched(content, (at, struct.pack(field, wrong))))
    if said == 2:  # a sample, which need not be said
        read = check_length(path, range(31999, 32001))
    else:
        read = check_length(path, range(32000, 32001), "its header tells")
    np.testing.assert_array_equal(to_int16(read)[0], pcm[: len(read)])


@pytest.mark.parametrize("form", ["WAV", "W64", "RF64", "AU", "CAF", "AIFF", "NIST"])
@pytest.mark.parametrize("cut", [2, 20000])
def test_recordings_without_their_end(tmp_path: Path, form: str, cut: int) -> None:
    path = tmp_path / "a.x"
    soundfile.write(path, np.full(16000, 0.25), 16000, "PCM_16", format=form)
    path.write_bytes(path.read_bytes()[:-cut])
    read, _ = read_audio(path)
    assert len(read) == audio_info(path).samples
    assert abs(len(read) - (16000 - cut // 2)) <= (cut > 2 and form == "CAF") * 4096
    assert bool(audio_info(path).notes) == (cut > 2)
    with pytest.raises(AudioError) as error:
        read_audio(path, 0.9, 1.4)
    assert error.value.reason == "segment_past_end"
    assert len(read_audio(path, 0.0, 0.25)[0]) == 4000  # before the damage


@pytest.mark.parametrize("subtype", ["PCM_16", "ULAW", "PCM_24"])
@pytest.mark.parametrize(
    ("said", "noted"), [(0, True), (16000, True), (31999, False), (99999, True)]
)
def test_lengths_that_sphere_headers_get_wrong(
    tmp_path: Path, subtype: str, said: int, noted: bool
) -> None:
    path = tmp_path / "a.sph"
    stereo = np.full((32000, 2), 0.25)
    soundfile.write(path, stereo, 16000, subtype, format="NIST")
    count = f"sample_count -i {said:05}".encode()
    path.write_bytes(path.read_bytes().replace(b"sample_count -i 32000", count))
    note = f"tells of {said} samples; 32000 are" if noted else ""
    check_length(path, range(32000, 32001), note)


def test_other_chunks_behind_the_samples_are_no_audio(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(), 16000)
    path.write_bytes(path.read_bytes() + b"LIST\x04\0\0\0abcd")
    assert audio_info(path).samples == 16000 and not audio_info(path).notes


@pytest.mark.parametrize("tag", [b"", b"ID3\x04\0\0\0\0\1\0" + bytes(128)])
@pytest.mark.parametrize("said", [0, 8000, 64000, 2**36 - 1])
def test_lengths_that_flac_headers_get_wrong(
    tmp_path: Path, said: int, tag: bytes
) -> None:
    path = tmp_path / "a.flac"
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 32000)
    soundfile.write(path, noise, 16000)
    whole, _ = read_audio(path)
    content = path.read_bytes()
    length = (content[21] & 0xF0).to_bytes(1, "big") + bytes(4)
    length = (int.from_bytes(length, "big") + said).to_bytes(5, "big")
    path.write_bytes(tag + patched(content, (21, length)))
    read = check_length(path, range(32000, 32001), "its header tells")
    np.testing.assert_array_equal(read, whole)
    np.testing.assert_array_equal(read_audio(path, 0.5, 1.5)[0], whole[8000:24000])
    with pytest.raises(AudioError, match="is not inside its 2.000 s"):
        read_audio(path, 0.5, 2.5)


def test_marks_within_flac_frames(tmp_path: Path) -> None:
    """Samples can look like the mark of a frame, with any byte behind it."""
    path = tmp_path / "a.flac"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.3, 0.3, 2000), 16000)
    content = path.read_bytes()
    for code in range(256):
        path.write_bytes(content + bytes([255, 0xF8, code, *[255] * 13]))
        assert audio_info(path).samples == 2000, code


@pytest.mark.parametrize(
    ("form", "subtype"), [("WAV", "GSM610"), ("AU", "G721_32"), ("CAF", "ALAC_16")]
)
def test_codings_that_libsndfile_does_not_seek_in(
    tmp_path: Path, form: str, subtype: str
) -> None:
    path = tmp_path / "a.x"
    soundfile.write(path, tone(), 16000, subtype, format=form)
    whole, _ = read_audio(path)
    assert audio_info(path).samples == len(whole) and 16000 <= len(whole) <= 16320
    assert len(read_audio(path, 0.25, 0.5)[0]) == 4000
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    try:
        assert audio_info(path).samples == len(read_audio(path)[0]) < 8200
    except AudioError:
        assert subtype == "ALAC_16"  # whose packets are listed at the end


def ogg_page(page: bytes, position: int) -> bytes:
    """A page of Ogg with another position, and the checksum of that."""
    page = patched(page, (6, position.to_bytes(8, "little")), (22, bytes(4)))
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc >> 31 else 0)) & 0xFFFFFFFF
    return patched(page, (22, crc.to_bytes(4, "little")))


def ogg_pages(content: bytes) -> list[bytes]:
    pages = []
    while content:
        lengths = content[27 : 27 + content[26]]
        size = 27 + len(lengths) + sum(lengths)
        pages.append(content[:size])
        content = content[size:]
    return pages


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize(
    ("told", "noted"),
    [
        (lambda position, _: 0, True),
        (lambda position, first: min(position, first), True),  # stays
        (lambda position, _: min(position, 1000), True),
        (lambda position, _: position // 2, False),  # in another unit
    ],
)
def test_ogg_whose_positions_are_wrong(
    tmp_path: Path, subtype: str, told: Callable[[int, int], int], noted: bool
) -> None:
    """As programs write them that do not count.

    Args:
        told: from the right position and that of the first page of samples.
        noted: whether it must show.
    """
    path = tmp_path / "a.ogg"
    soundfile.write(path, tone(8.0), 16000, subtype, format="OGG")
    pages = ogg_pages(path.read_bytes())
    right = [int.from_bytes(page[6:14], "little") for page in pages]
    wrong = [told(position, right[2]) for position in right]
    path.write_bytes(b"".join(map(ogg_page, pages, wrong)))
    info = audio_info(path)
    samples, rate = read_audio(path)
    assert len(samples) == info.samples and 0 <= info.seconds - 8.0 < 0.02
    assert info.notes or not noted
    spectrum = np.abs(np.fft.rfft(samples[4 * rate : 8 * rate]))
    assert abs(int(spectrum.argmax()) - 4 * 440) <= 4


@pytest.mark.parametrize(
    ("position", "note"),
    [
        (1000, "tells of 1000 samples; 64000 are there"),  # below that of another page
        (144000, "tells of 144000 samples; 64000 are there"),
        (1 << 60, "tells no length"),
        (None, "breaks off"),  # the file is cut within its last page
    ],
)
def test_ogg_whose_last_position_is_wrong(
    tmp_path: Path, position: int | None, note: str
) -> None:
    """The last one is the length that decoders believe."""
    path = tmp_path / "a.ogg"
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 64000)
    soundfile.write(path, noise, 16000)
    content = path.read_bytes()
    last = content.rindex(b"OggS")
    end = content[last:-9] if position is None else ogg_page(content[last:], position)
    path.write_bytes(content[:last] + end)
    left = range(50001, 64000) if position is None else range(64000, 64001)
    check_length(path, left, note)


@pytest.mark.parametrize(
    ("frames", "missing", "note"),
    [
        (1.0, 0, ""),
        (0.5, 0, "tells of .* samples; 320000 are there"),
        (2.0, 0, "tells of .* samples; 32.... are there"),
        (100.0, 0, "tells no length"),
        (0.0, 0, "tells of .* samples; 32.... are there"),
        # A rate that varies, and no count; also recorded from within a frame on.
        (None, 0, "tells of .* samples; 32.... are there"),
        (None, 200, "tells of .* samples; 3[12].... are there"),
    ],
)
def test_mp3_whose_count_is_wrong(
    tmp_path: Path, frames: float | None, missing: int, note: str
) -> None:
    """libsndfile believes the first frame, or guesses from its size (half is lost).

    Args:
        frames: told by the first frame, as a multiple of what is there; None: that
            frame is missing.
        missing: bytes of the next frame.
        note: what is said.
    """
    path = tmp_path / "a.mp3"
    wave = tone(20.0) + np.random.default_rng(0).normal(0, 0.01, 320000)
    soundfile.write(path, wave, 16000)
    content = path.read_bytes()
    place = content.index(b"Xing") + 8
    if frames is None:
        content = content[content.index(content[:2], place) + missing :]
    else:
        count = int(int.from_bytes(content[place : place + 4], "big") * frames)
        content = patched(content, (place, count.to_bytes(4, "big")))
    path.write_bytes(content)
    info = audio_info(path)
    assert abs(info.samples - 320000) < 3 * 1152
    assert len(read_audio(path)[0]) == info.samples
    assert re.match(f"length .*({note})", info.notes[0]) if note else not info.notes


@pytest.mark.parametrize(
    ("missing", "least"), [(1, 155000), (2, 155000), (2000, 155000), (0.5, 75000)]
)
def test_flac_without_its_end(tmp_path: Path, missing: float, least: int) -> None:
    """Also within the last frame, whose beginning still tells the right length.

    Args:
        missing: bytes, or the share of the file.
        least: samples that are there.
    """
    path = tmp_path / "a.flac"
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 159000)
    soundfile.write(path, noise, 16000)
    whole, content = read_audio(path)[0], path.read_bytes()
    count = int(missing if missing >= 1 else missing * len(content))
    path.write_bytes(content[:-count])
    note = "header tells of 159000 samples"
    read = check_length(path, range(least + 1, least + 5000), note)
    np.testing.assert_array_equal(read, whole[: len(read)])
    end = read_audio(path, least / 16000, len(read) / 16000)[0]
    np.testing.assert_array_equal(end, read[least:])


def test_damaged_flac(tmp_path: Path) -> None:
    """Damage in the midst loses what is there."""
    path = tmp_path / "a.flac"
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 160000)
    soundfile.write(path, noise, 16000)
    whole, content = read_audio(path)[0], path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(patched(content, (middle, bytes([content[middle] ^ 255]))))
    with pytest.raises(AudioError) as error:
        read_audio(path)
    assert error.value.reason == "unreadable" and str(path) in str(error.value)
    np.testing.assert_array_equal(read_audio(path, 0.0, 1.0)[0], whole[:16000])


def write_by_av(
    path: Path, codec: str, samples: np.ndarray, rate: int = 16000, form: str = ""
) -> None:
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        if form:
            stream.format = form
        to_codec = av.AudioResampler(stream.format, "mono", rate)
        data = np.ascontiguousarray(samples[None], np.float32)
        frame = av.AudioFrame.from_ndarray(data, format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        fifo = av.AudioFifo()
        for converted in to_codec.resample(frame):
            fifo.write(converted)
        for part in fifo.read_many(960 if codec == "libopus" else 1024, partial=True):
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("suffix", "codec", "cut", "block"),
    [
        ("wv", "wavpack", 1, 64000),
        ("wv", "wavpack", 2000, 64000),
        ("caf", "alac", 1, 4096),  # further on, CAF lists its packets
    ],
)
def test_packets_that_are_cut(
    tmp_path: Path, suffix: str, codec: str, cut: int, block: int
) -> None:
    """What precedes a packet that PyAV cannot fetch is there.

    Args:
        cut: bytes.
        block: samples of a packet.
    """
    path = tmp_path / f"a.{suffix}"
    write_by_av(path, codec, np.random.default_rng(0).uniform(-0.3, 0.3, 96000))
    path.write_bytes(path.read_bytes()[:-cut])
    note = "breaks off|are damaged|are there"
    check_length(path, range(96000 - block, 96001), note)


@pytest.mark.parametrize(
    "kind",
    "vorbis opus oga wav flac mp3 aiff w64 caf m4a".split(),
)
def test_joined_recordings_are_read_to_their_end(tmp_path: Path, kind: str) -> None:
    """Chained Ogg as radio streams have it, and files that were put together."""
    parts = tmp_path / "1", tmp_path / "2"
    low, high = tone(2.0), tone(1.0, freq=1000.0)
    for part, samples in zip(parts, (low, high), strict=True):
        if kind in ("oga", "m4a"):
            codec = "flac" if kind == "oga" else "aac"
            write_by_av(part.with_suffix(f".{kind}"), codec, samples)
            part.with_suffix(f".{kind}").rename(part)
        else:
            subtype = {"vorbis": "VORBIS", "opus": "OPUS"}.get(kind)
            form = "OGG" if subtype else kind.upper()
            soundfile.write(part, samples, 16000, subtype, format=form)
    first, second = (part.read_bytes() for part in parts)
    path = tmp_path / "joined"
    for joined, seconds in ((first + second, 3), (first + first, 4)):
        path.write_bytes(joined)
        info = audio_info(path)
        samples, rate = read_audio(path)
        assert rate == 16000 and info.samples == len(samples)
        assert abs(len(samples) - seconds * 16000) <= (4000 if kind == "mp3" else 0)
    end = np.abs(np.fft.rfft(read_audio(path, 3.0, 4.0)[0])).argmax()
    path.write_bytes(first + second)
    assert np.abs(np.fft.rfft(read_audio(path, 2.2, 2.7)[0])).argmax() == 500
    assert end == 440
    (piece, _), (again, _) = read_pieces(path, [Span(2.2, 2.7), Span(0.2, 0.7)])
    assert len(piece) == len(again) == 8000


def test_links_of_another_rate(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "1.ogg", tone(1.0), 16000)
    soundfile.write(tmp_path / "2.ogg", tone(1.0, 8000), 8000)
    path = tmp_path / "a.ogg"
    joined = (tmp_path / "1.ogg").read_bytes() + (tmp_path / "2.ogg").read_bytes()
    path.write_bytes(joined)
    samples, rate = read_audio(path)
    assert rate == 16000 and len(samples) == audio_info(path).samples == 32000
    assert np.abs(np.fft.rfft(samples[16000:])).argmax() == 440


@pytest.mark.parametrize(
    ("suffix", "codec", "rate"),
    [("m4a", "aac", 16000), ("aac", "aac", 16000), ("webm", "libopus", 48000)],
)
def test_lengths_by_decoding_take_little_memory(
    tmp_path: Path, suffix: str, codec: str, rate: int
) -> None:
    path = tmp_path / f"a.{suffix}"
    write_by_av(path, codec, tone(30.0, rate), rate)
    audio_info(path)
    tracemalloc.start()
    info = audio_info(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert info.rate == rate and abs(info.seconds - 30) < 0.2 and not info.notes
    assert peak < 1_500_000  # the samples take 2 MB, or 6
    tracemalloc.start()
    for piece, _ in read_pieces(path, [Span(t, t + 1.0) for t in range(29)]):
        assert len(piece) == rate
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_500_000
    assert len(read_audio(path)[0]) == info.samples
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    if suffix == "webm":
        assert "tells of 30" in audio_info(path).notes[0]
        assert 20 < audio_info(path).seconds < 25


@pytest.mark.parametrize("scale", [127, 32767, 2.0**23, 2.0**31])
def test_samples_that_are_not_in_the_scale_of_one(tmp_path: Path, scale: float) -> None:
    path = tmp_path / "a.wav"
    quiet = np.concatenate([1e-6 * tone(), tone()])
    for samples in (quiet, np.stack([quiet, quiet], 1)):
        soundfile.write(path, samples * scale, 16000, "FLOAT")
        with pytest.raises(AudioError, match="divide them") as error:
            read_audio(path)
        assert error.value.reason == "scale"
        with pytest.raises(AudioError, match="divide them"):
            read_audio(path, 0.0, 0.5)  # its scale shows elsewhere only
    soundfile.write(path, 1.5 * tone(), 16000, "FLOAT")  # louder than full scale
    assert np.abs(read_audio(path)[0]).max() < 1.5


@pytest.mark.parametrize(
    ("name", "codec", "form"),
    [
        ("joined.wav", "", "FLOAT"),
        ("a.mka", "pcm_f32le", "flt"),
        ("a.mka", "pcm_f64le", "dbl"),
        ("a.mov", "pcm_f32be", "flt"),
        ("a.wv", "wavpack", "fltp"),
    ],
)
def test_scale_of_pieces_that_are_not_sought(
    tmp_path: Path, name: str, codec: str, form: str
) -> None:
    """The scale shows elsewhere only."""
    path = tmp_path / name
    quiet, loud = 1e-5 * tone() * 32767, tone() * 32767
    if codec:
        write_by_av(path, codec, np.concatenate([quiet, loud]), form=form)
    else:
        parts = []
        for samples in (quiet, loud):
            soundfile.write(path, samples, 16000, form)
            parts.append(path.read_bytes())
        path.write_bytes(b"".join(parts))
    for end in (0.5, None):
        with pytest.raises(AudioError, match="divide them") as error:
            read_audio(path, 0.0, end)
        assert error.value.reason == "scale"


@pytest.mark.parametrize("turned", ["all", "half"])
@pytest.mark.parametrize("gain", [-1.0, -0.8])
@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_channels_that_cancel_each_other(
    tmp_path: Path, gain: float, suffix: str, turned: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    other = gain * tone(10.0)
    if turned == "half":
        other[:80000] *= -1
    soundfile.write(path, np.stack([tone(10.0), other], 1), 16000)
    ((samples, info),) = read_pieces(path, [Span(0.25, 9.75)])
    np.testing.assert_allclose(samples, tone(10.0)[4000:156000], atol=0.05)
    assert info.notes[0].startswith("one_channel") and "channel 0" in info.notes[0]


def test_entries_of_arks(tmp_path: Path) -> None:
    """As ESPnet's ``--audio_format flac.ark`` and ``wav.ark`` write them."""
    content = {}
    for suffix in ("flac", "wav"):
        soundfile.write(tmp_path / f"a.{suffix}", to_int16(tone())[0], 16000)
        content[suffix] = (tmp_path / f"a.{suffix}").read_bytes()
    ark = tmp_path / "data.ark"
    framed = b"AUDIO\x02" + len(content["flac"]).to_bytes(2, "little")
    ark.write_bytes(
        b"u1 " + framed + content["flac"] + b"u2 " + content["wav"] + b"u3 x"
    )
    second = 3 + len(framed) + len(content["flac"]) + 3
    for offset in (3, second):
        samples, rate = read_audio(f"{ark}:{offset}")
        assert rate == 16000 and audio_info(f"{ark}:{offset}").samples == 16000
        np.testing.assert_array_equal(samples, read_audio(tmp_path / "a.flac")[0])
        assert len(read_audio(f"{ark}:{offset}", 0.25, 0.5)[0]) == 4000
    for offset in (0, 4, second + len(content["wav"]) + 3, 10**9):
        with pytest.raises(AudioError, match="no audio begins at byte"):
            read_audio(f"{ark}:{offset}")
    ark.write_bytes(ark.read_bytes()[:-1000])  # cut off
    with pytest.raises(AudioError, match="the ark is cut off"):
        read_audio(f"{ark}:{second}")
    with pytest.raises(AudioError, match="no such file"):
        read_audio(f"{tmp_path}/gone.ark:3")


@pytest.mark.parametrize(
    ("riff", "data", "last", "right"),
    [
        (0, 0, True, True),
        (2**32 - 1, 2**32 - 1, True, True),
        (0x7FFFF024, 0x7FFFF000, True, True),
        (0, 32000, False, True),
        (0x7FFFF024, 32000, False, True),
        (0x7FFFF024, 0x7FFFF000, False, False),  # where it ends is not known
        (0, 0, False, False),
    ],
)
@pytest.mark.parametrize("framed", [False, True])
def test_entries_of_arks_that_were_never_finalised(
    tmp_path: Path, riff: int, data: int, last: bool, right: bool, framed: bool
) -> None:
    """As of a pipe.

    Args:
        riff: the size of the file as the header tells it.
        data: that of the samples.
        last: whether no other entry follows.
        right: whether it can be read.
        framed: the entry has a length of its own.
    """
    soundfile.write(tmp_path / "a.wav", tone(), 16000)
    content = (tmp_path / "a.wav").read_bytes()
    sizes = (riff.to_bytes(4, "little"), data.to_bytes(4, "little"))
    wrong = patched(content, (4, sizes[0]), (after(content, b"data"), sizes[1]))
    if framed:
        wrong = b"AUDIO\x04" + len(wrong).to_bytes(4, "little") + wrong
    ark = tmp_path / "data.ark"
    ark.write_bytes(b"u1 " + wrong + (b"" if last else b"u2 " + content))
    if right or framed:
        samples, _ = read_audio(f"{ark}:3")
        np.testing.assert_array_equal(samples, read_audio(tmp_path / "a.wav")[0])
        assert bool(audio_info(f"{ark}:3").notes) == (data != 32000)
    else:
        with pytest.raises(AudioError, match="tells no length.*make the ark again"):
            read_audio(f"{ark}:3")
    if not last:
        assert len(read_audio(f"{ark}:{3 + len(wrong) + 3}")[0]) == 16000


def test_codings_of_telephone_corpora_that_nothing_here_decodes(tmp_path: Path) -> None:
    path = tmp_path / "a.sph"
    soundfile.write(path, tone(), 16000, "PCM_16", format="NIST")
    content = path.read_bytes()
    coding = b"sample_coding -s3 pcm"
    shorten = b"sample_coding -s26 pcm,embedded-shorten-v2.00"
    path.write_bytes(content.replace(coding, shorten)[:1024] + b"ajkg\x02" + bytes(999))
    for look in (audio_info, read_audio):
        with pytest.raises(AudioError, match="sph2pipe -f wav") as error:
            look(path)
        assert error.value.reason == "unreadable"


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9 x"
    os.mkdir(folder)
    for suffix in ("wav", "flac", "m4a"):
        path = Path(os.fsdecode(folder + b"/n\xff." + suffix.encode()))
        plain = tmp_path / f"plain.{suffix}"
        if suffix == "m4a":  # read by PyAV
            write_by_av(plain, "aac", np.zeros(16000))
        else:
            soundfile.write(plain, np.zeros(16000), 16000)
        plain.rename(path)
        assert audio_info(path).rate == 16000
        assert len(read_audio(path)[0]) >= 16000
        with pytest.raises(AudioError, match="no such file"):
            read_audio(path.with_name("gone\udcff.wav"))


def test_mp3_whose_length_is_an_estimate(tmp_path: Path) -> None:
    """Without a header that counts its frames, libsndfile says a little more."""
    path = tmp_path / "a.mp3"
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, (1, 33333)).astype(np.float32)
    options = {"write_xing": "0", "id3v2_version": "0"}
    with av.open(str(path), "w", format="mp3", options=options) as file:
        stream = file.add_stream("mp3", rate=11025, layout="mono")
        stream.bit_rate = 16000
        frame = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
        frame.sample_rate = 11025
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            file.mux(packet)
    said = audio_info(path).samples
    samples, rate = read_audio(path)
    assert rate == 11025 and said - 1152 <= len(samples) < said
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])
    shorter, _ = read_audio(path)  # MP3 has no end that could be missing
    assert len(shorter) < 0.7 * len(samples)

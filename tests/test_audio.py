"""Reading of audio files: formats, segments, channels and damaged files."""

import os
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
    for (piece, info), part in zip(pieces, expected, strict=True):
        np.testing.assert_array_equal(piece, part)
        assert info.samples == len(whole)


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
    cases = {
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


def test_truncated_flac_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 160000)
    soundfile.write(path, noise, 16000)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(AudioError) as error:
        read_audio(path)
    assert error.value.reason == "unreadable" and str(path) in str(error.value)
    samples, _ = read_audio(path, 0.0, 1.0)  # before the damage
    assert len(samples) == 16000


def test_truncated_wav_is_unreadable_at_its_end(tmp_path: Path) -> None:
    """libsndfile takes what is there for the whole."""
    path = tmp_path / "a.wav"
    soundfile.write(path, np.full(16000, 0.25), 16000)
    content = path.read_bytes()
    path.write_bytes(content[:20044])
    with pytest.raises(AudioError, match="truncated: 12000 bytes are missing") as error:
        read_audio(path)
    assert error.value.reason == "unreadable" and str(path) in str(error.value)
    assert len(read_audio(path, 0.0, 0.5)[0]) == 8000  # before the damage
    with pytest.raises(AudioError) as error:
        read_audio(path, 0.5, 0.9)
    assert error.value.reason == "segment_past_end"
    # What came through a pipe has no length in its header.
    for length in (b"\xff\xff\xff\xff", b"\x00\xf0\xff\x7f"):
        at = content.index(b"data") + 4
        path.write_bytes(content[:at] + length + content[at + 4 :])
        assert len(read_audio(path)[0]) == 16000


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9 x"
    os.mkdir(folder)
    for suffix in ("wav", "flac", "m4a"):
        path = Path(os.fsdecode(folder + b"/n\xff." + suffix.encode()))
        plain = tmp_path / f"plain.{suffix}"
        if suffix == "m4a":  # read by PyAV
            with av.open(str(plain), "w") as file:
                stream = file.add_stream("aac", rate=16000, layout="mono")
                frame = av.AudioFrame.from_ndarray(
                    np.zeros((1, 16000), np.float32), format="fltp", layout="mono"
                )
                frame.sample_rate = 16000
                for packet in [*stream.encode(frame), *stream.encode(None)]:
                    file.mux(packet)
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

"""Audio files in, mono float32 out: soundfile first, PyAV for what it cannot read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import soundfile
import soxr

from espnet2_spear.errors import UserError
from espnet2_spear.fileio.riff import missing_bytes

# Formats without a header, known by their name only (the rate comes from the codec).
RAW_FORMATS = {".g722": "g722", ".gsm": "gsm"}
AUDIO_SUFFIXES = frozenset(
    ".wav .flac .ogg .oga .opus .mp3 .aif .aiff .au .sph .w64 .caf .m4a .aac .mp4 .webm"
    " .wma .amr .g722 .gsm".split()
)
MIN_RATE, MAX_RATE = 4000, 384000  # Hz; outside, a header is taken for damaged
MP3_FRAME = 1152  # samples, at most
SEGMENT_SLACK = 0.1  # seconds that a segment may reach past its recording


class Span(NamedTuple):
    """A piece of a recording.

    Attributes:
        start: in seconds; None: from its beginning.
        end: in seconds; None: to its end.
        channel: from 0; None: the mean of all channels.
    """

    start: float | None = None
    end: float | None = None
    channel: int | None = None


class AudioError(UserError):
    """An audio file cannot be used; the message names the file and the remedy.

    Attributes:
        reason: One word for lists of skipped utterances: ``unreadable``, ``empty``,
            ``bad_rate``, ``not_finite``, ``no_channel`` or ``segment_past_end``.
    """

    def __init__(
        self, path: str | os.PathLike[str], reason: str, detail: str, remedy: str
    ) -> None:
        super().__init__(f"{path}: {detail}; {remedy}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class AudioInfo:
    """Shape of a recording.

    Attributes:
        rate: Sampling rate in Hz.
        channels: Number of channels.
        samples: Samples per channel.
    """

    rate: int
    channels: int
    samples: int

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.samples / self.rate


def audio_info(path: str | os.PathLike[str]) -> AudioInfo:
    """Return rate, channels and length, from the header where there is one.

    Raises:
        AudioError: the file is missing, unreadable, empty or of an impossible rate.
    """
    path = _existing(path)
    if path.suffix.lower() not in RAW_FORMATS:
        try:
            info = soundfile.info(os.fsencode(path))
        except (soundfile.SoundFileError, RuntimeError, TypeError):
            pass
        else:
            return _checked(
                path, AudioInfo(info.samplerate, info.channels, info.frames)
            )
    data, rate = _decode_av(path)
    return _checked(path, AudioInfo(rate, data.shape[1], data.shape[0]))


def read_pieces(
    path: str | os.PathLike[str], spans: Sequence[Span]
) -> Iterator[tuple[np.ndarray | AudioError, AudioInfo]]:
    """Read several pieces of one recording, opening and decoding it once.

    Formats that soundfile seeks in are read piece by piece; others are decoded whole.

    Args:
        path: Audio file.
        spans: The pieces.

    Yields:
        For each span mono float32 samples in [-1, 1], or the
        AudioError that concerns this piece alone; and the recording's shape.

    Raises:
        AudioError: the whole file is missing, unreadable, empty or of a bad rate.
    """
    path = _existing(path)
    if path.suffix.lower() not in RAW_FORMATS:
        try:
            file = soundfile.SoundFile(os.fsencode(path))
        except (soundfile.SoundFileError, RuntimeError, TypeError):
            pass
        else:
            with file:
                info = AudioInfo(file.samplerate, file.channels, file.frames)
                _checked(path, info)
                cut_off = missing_bytes(path)
                for span in spans:
                    try:
                        first, last = _sample_range(path, info, span)
                        if cut_off and last == info.samples:
                            detail = f"truncated: {cut_off} bytes are missing"
                            raise _unreadable(path, detail)
                        data = _read_soundfile(path, file, first, last)
                        piece = _mono(path, data, span.channel)
                    except AudioError as error:
                        yield error, info
                    else:
                        yield piece, info
            return
    data, rate = _decode_av(path)
    info = _checked(path, AudioInfo(rate, data.shape[1], data.shape[0]))
    for span in spans:
        try:
            first, last = _sample_range(path, info, span)
            piece = _mono(path, data[first:last], span.channel)
        except AudioError as error:
            yield error, info
        else:
            yield piece, info


def read_audio(
    path: str | os.PathLike[str], start: float | None = None, end: float | None = None
) -> tuple[np.ndarray, int]:
    """Read a recording, or the part of it from ``start`` to ``end`` seconds.

    Returns:
        Mono samples (samples,) float32 in [-1, 1], and the rate in Hz.

    Raises:
        AudioError: see :func:`read_pieces`.
    """
    ((piece, info),) = read_pieces(path, [Span(start, end)])
    if isinstance(piece, AudioError):
        raise piece
    return piece, info.rate


def resample(samples: np.ndarray, rate: int, target_rate: int = 16000) -> np.ndarray:
    """Resample (samples,) float32 with soxr in high quality, if rates (Hz) differ."""
    if rate == target_rate:
        return samples
    return soxr.resample(samples, rate, target_rate, quality="HQ")


def to_int16(samples: np.ndarray) -> tuple[np.ndarray, int]:
    """Quantise [-1, 1] to 16 bits, and count the samples that had to be clipped.

    The scale is 32768, so that 16-bit audio read as float comes back bit by bit
    (libsndfile's own conversion scales by 32767 and does not).
    """
    scaled = np.rint(samples.astype(np.float64) * 32768.0)
    clipped = int(np.count_nonzero((scaled > 32767) | (scaled < -32768)))
    return np.clip(scaled, -32768, 32767).astype(np.int16), clipped


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_file():
        raise AudioError(
            path,
            "unreadable",
            "no such file",
            "restore it or remove its line from wav.scp",
        )
    if path.stat().st_size == 0:
        raise AudioError(
            path,
            "empty",
            "the file has 0 bytes",
            "fetch it again or remove its line from wav.scp",
        )
    return path


def _checked(path: Path, info: AudioInfo) -> AudioInfo:
    if info.samples == 0:
        raise AudioError(
            path,
            "empty",
            "the file holds no samples",
            "fetch it again or remove its line from wav.scp",
        )
    if not MIN_RATE <= info.rate <= MAX_RATE:
        raise AudioError(
            path,
            "bad_rate",
            f"sampling rate {info.rate} Hz is outside {MIN_RATE}..{MAX_RATE} Hz",
            "the header is damaged: convert the original again",
        )
    return info


def _sample_range(path: Path, info: AudioInfo, span: Span) -> tuple[int, int]:
    start, end, _ = span
    first = 0 if start is None else round(start * info.rate)
    last = info.samples if end is None else round(end * info.rate)
    slack = round(SEGMENT_SLACK * info.rate)
    if not 0 <= first < last or first >= info.samples or last > info.samples + slack:
        raise AudioError(
            path,
            "segment_past_end",
            f"segment {start} to {end} s is not inside its {info.seconds:.3f} s",
            "correct the line in segments, or restore a truncated recording",
        )
    return first, min(last, info.samples)


def _read_soundfile(
    path: Path, file: soundfile.SoundFile, first: int, last: int
) -> np.ndarray:
    try:
        file.seek(first)
        data = file.read(last - first, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise _unreadable(path, str(error)) from error
    # The length of an MP3 without a header of its own is an estimate, off by less than
    # a frame.
    slack = MP3_FRAME if file.format == "MP3" and last == file.frames else 0
    if len(data) < max(1, last - first - slack):
        raise _unreadable(
            path, f"truncated: {len(data)} of {last - first} samples could be decoded"
        )
    return data


def _mono(path: Path, data: np.ndarray, channel: int | None) -> np.ndarray:
    channels = data.shape[1]
    if channel is None:
        samples = data[:, 0] if channels == 1 else data.mean(axis=1)
    elif 0 <= channel < channels:
        samples = data[:, channel]
    else:
        raise AudioError(
            path,
            "no_channel",
            f"channel {channel} (from 0) is asked for of {channels}",
            "correct the last column of segments",
        )
    if not np.isfinite(samples).all():
        raise AudioError(
            path,
            "not_finite",
            "the samples include NaN or infinity",
            "convert the original again",
        )
    return np.ascontiguousarray(samples, dtype=np.float32)


def _decode_av(path: Path) -> tuple[np.ndarray, int]:
    """Decode a whole file with PyAV to (samples, channels) float32 and its rate."""
    to_float = av.AudioResampler(format="fltp")
    chunks: list[np.ndarray] = []
    rate = 0
    try:
        container = av.open(
            os.fspath(path), format=RAW_FORMATS.get(path.suffix.lower())
        )
        with container:
            if not container.streams.audio:
                raise _unreadable(path, "it holds no audio")
            for frame in container.decode(audio=0):
                rate = frame.sample_rate
                chunks += [out.to_ndarray() for out in to_float.resample(frame)]
            if chunks:
                chunks += [out.to_ndarray() for out in to_float.resample(None)]
    except (av.error.FFmpegError, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        raise _unreadable(path, str(error)) from error
    if not chunks:
        raise _unreadable(path, "no samples could be decoded")
    return np.concatenate(chunks, axis=1).T, rate


def _unreadable(path: Path, detail: str) -> AudioError:
    return AudioError(
        path,
        "unreadable",
        f"cannot be decoded as audio ({detail})",
        "fetch it again, convert it to wav or flac, or remove its line from wav.scp",
    )

"""Recordings of any form in, mono float32 out.

One rule for lengths, here and wherever recordings are read: what is there is read. A
header that tells more, less or nothing is noted (and, by an option, refused).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import soxr

from espnet2_spear.constants import MAX_PEAK, SAMPLE_RATE
from espnet2_spear.fileio.decode import (
    BLOCK,
    AudioError,
    DecodedWindow,
    Source,
    split_ark,
    undecodable,
)

AUDIO_SUFFIXES = frozenset(
    ".wav .w64 .rf64 .aif .aiff .aifc .au .snd .caf .voc .sph .nist .flac .wv .tta .ape"
    " .ogg .oga .opus .spx .mp2 .mp3 .m4a .m4b .aac .ac3 .eac3 .wma .amr .awb .g722"
    " .gsm .mka .mkv .webm .mp4 .m4v .mov .3gp .3g2 .avi .mpg".split()
)
MIN_RATE, MAX_RATE = 4000, 384000  # Hz; outside, a header is taken for damaged
MAX_LOST = 0.1  # power in blocks whose channels cancel each other, of all
CANCELLED = 0.03  # power of the mean of channels, of theirs: they are in opposite phase
MAX_SAID = 20  # notes of a process that are logged
_said = 0
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


@dataclass(frozen=True)
class AudioInfo:
    """Shape of a recording.

    Attributes:
        rate: Sampling rate in Hz.
        channels: Number of channels.
        samples: Samples per channel.
        notes: What is wrong with it though it is read, each a word (``length`` or
            ``one_channel``) and an explanation.
    """

    rate: int
    channels: int
    samples: int
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.samples / self.rate


def audio_info(path: str | os.PathLike[str], strict: bool = False) -> AudioInfo:
    """Return rate, channels and length, from the header where that can be true.

    Otherwise the file is decoded, block by block, to count its samples.

    Args:
        path: Audio file, or ``file.ark:offset``.
        strict: Whether a header that differs from what is there is an error.

    Raises:
        AudioError: the file is missing, unreadable, empty or of an impossible rate.
    """
    with _opened(path) as source:
        samples = source.samples
        if samples is None:
            samples = sum(len(block) for block in source.blocks())
        return _checked(path, source, samples, strict)


def read_pieces(
    path: str | os.PathLike[str], spans: Sequence[Span], strict: bool = False
) -> Iterator[tuple[np.ndarray | AudioError, AudioInfo]]:
    """Read several pieces of one recording, opening and decoding it once.

    Formats that soundfile seeks in are read piece by piece. Others are decoded from
    the beginning to the last piece; if pieces come in the order of time, only one of
    them is in memory.

    Args:
        path: Audio file, or ``file.ark:offset``.
        spans: The pieces.
        strict: Whether a header that differs from what is there is an error. Without
            it, what is there is read, and ``notes`` tell the difference.

    Yields:
        For each span mono float32 samples in [-1, 1], or the
        AudioError that concerns this piece alone; and the recording's shape, whose
        ``samples`` are 0 as long as only decoding tells them.

    Raises:
        AudioError: the whole file is missing, unreadable, empty or of a bad rate.
    """
    with _opened(path) as source:
        info = _checked(path, source, source.samples, strict)
        window = DecodedWindow(source)
        partly = source.is_float and any(s[:2] != (None, None) for s in spans)
        peak = _peak(source) if partly else 0.0
        for span in spans:
            try:
                data = _read(path, source, window, span)
                check_peak(path, max(peak, _largest(path, data)))
                # Decoding to the end may have shown a wrong header.
                samples = source.samples or window.length
                info = _checked(path, source, samples, strict)
                piece, note = _mono(path, data, span.channel)
            except AudioError as error:
                yield error, info
            else:
                info = replace(info, notes=(*info.notes, *note))
                _say(path, info.notes)
                yield piece, info


def read_audio(
    path: str | os.PathLike[str],
    start: float | None = None,
    end: float | None = None,
    strict: bool = False,
) -> tuple[np.ndarray, int]:
    """Read a recording, or the part of it from ``start`` to ``end`` seconds.

    Returns:
        Mono samples (samples,) float32 in [-1, 1], and the rate in Hz.

    Raises:
        AudioError: see :func:`read_pieces`.
    """
    ((piece, info),) = read_pieces(path, [Span(start, end)], strict)
    if isinstance(piece, AudioError):
        raise piece
    return piece, info.rate


def resample(
    samples: np.ndarray, rate: int, target_rate: int = SAMPLE_RATE
) -> np.ndarray:
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


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Source]:
    """Open a recording that is there."""
    file, _ = split_ark(path)
    if not file.is_file():
        raise AudioError(path, "unreadable", "no such file")
    if file.stat().st_size == 0:
        raise AudioError(path, "empty", "the file has 0 bytes")
    with Source(path) as source:
        yield source


def _checked(
    path: str | os.PathLike[str], source: Source, samples: int | None, strict: bool
) -> AudioInfo:
    """The shape of a recording whose length may not be known yet."""
    if samples == 0:
        raise AudioError(path, "empty", "the file holds no samples")
    if not MIN_RATE <= source.rate <= MAX_RATE:
        detail = f"sampling rate {source.rate} Hz is outside {MIN_RATE}..{MAX_RATE} Hz"
        raise AudioError(path, "bad_rate", detail)
    if strict and source.note:
        raise AudioError(path, "length", source.note)
    notes = (f"length {source.note}",) if source.note else ()
    return AudioInfo(source.rate, source.channels, samples or 0, notes)


def _read(
    path: str | os.PathLike[str], source: Source, window: DecodedWindow, span: Span
) -> np.ndarray:
    """Samples of a piece, (samples, channels).

    Raises:
        AudioError: the piece is not inside the recording, or cannot be decoded.
    """
    start, end, _ = span
    first = 0 if start is None else round(start * source.rate)
    last = None if end is None else round(end * source.rate)
    data, length = None, source.samples
    if length is None and 0 <= first and (last is None or first < last):
        data = window.read(first, last)
        length = window.length
    if length is not None:
        slack = round(SEGMENT_SLACK * source.rate)
        stop = length if last is None else last
        if not 0 <= first < stop or first >= length or stop > length + slack:
            seconds = f"{length / source.rate:.3f} s"
            detail = f"segment {start} to {end} s is not inside its {seconds}"
            raise AudioError(path, "segment_past_end", detail)
        if data is None:
            data = source.read(first, min(stop, length))
    if not len(data):
        raise undecodable(path, "no samples could be decoded")
    return data


def _mono(
    path: str | os.PathLike[str], data: np.ndarray, channel: int | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """One channel or the mean of all, and what there is to say about it."""
    channels, notes = data.shape[1], ()
    if channel is not None and not 0 <= channel < channels:
        detail = f"channel {channel} (from 0) is asked for of {channels}"
        raise AudioError(path, "no_channel", detail)
    if channel is None and channels > 1:
        samples = data.mean(axis=1)
        squares = np.square(data, dtype=np.float64)
        powers = squares.mean(axis=0)
        # A part of a recording may have its phase turned.
        starts = np.arange(0, len(data), BLOCK)
        of_channels = np.add.reduceat(squares.mean(axis=1), starts)
        of_mean = np.add.reduceat(np.square(samples, dtype=np.float64), starts)
        lost = of_channels[of_mean < CANCELLED * of_channels].sum()
        if lost > MAX_LOST * of_channels.sum():
            channel = int(np.flatnonzero(powers > powers.max() / 2)[0])
            notes = (
                f"one_channel its channels cancel each other (opposite phase): channel "
                f"{channel} is taken, not the mean",
            )
    if channel is not None or channels == 1:
        samples = data[:, channel or 0]
    return np.ascontiguousarray(samples, dtype=np.float32), notes


def _largest(path: str | os.PathLike[str], data: np.ndarray) -> float:
    """Largest absolute sample, in which NaN and infinity show.

    Raises:
        AudioError: of reason ``not_finite``.
    """
    peak = float(np.maximum(data.max(), -data.min()))
    if not math.isfinite(peak):
        raise AudioError(path, "not_finite", "the samples include NaN or infinity")
    return peak


def check_peak(name: str | os.PathLike[str], peak: float) -> None:
    """Refuse samples that are not in the scale of [-1, 1], such as 16-bit integers.

    Args:
        name: of the recording, for the message.
        peak: its largest absolute sample.

    Raises:
        AudioError: of reason ``scale``.
    """
    if peak > MAX_PEAK:
        detail = f"samples up to {peak:.6g}, where float samples lie in [-1, 1]"
        raise AudioError(name, "scale", detail)


def _peak(source: Source) -> float:
    """Largest absolute sample of a recording, or the first that is out of scale."""
    peak = 0.0
    for block in source.blocks():
        block = block[np.isfinite(block)]  # others are found with their piece
        peak = max(peak, float(np.abs(block).max(initial=0.0)))
        if peak > MAX_PEAK:
            break
    return peak


def _say(path: str | os.PathLike[str], notes: tuple[str, ...]) -> None:
    """Log the first notes of this process; all are counted by who keeps a list."""
    global _said
    for note in notes:
        _said += 1
        if _said <= MAX_SAID:
            logging.warning(f"{path}: {note.partition(' ')[2]}")
        if _said == MAX_SAID:
            logging.warning("further notes of this sort are not logged")

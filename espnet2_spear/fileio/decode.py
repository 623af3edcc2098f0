"""Decoders of recordings: soundfile where it seeks, PyAV for everything else.

A recording is a file, or an entry of a Kaldi ark (``file.ark:offset``, as ESPnet's
``--audio_format flac.ark`` writes them).
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import soxr

from espnet2_spear.errors import UserError
from espnet2_spear.fileio.containers import ByteRange, find_layout, wave_in_ark

# Formats without a header, known by their name only (the rate comes from the codec).
RAW_FORMATS = {".g722": "g722", ".gsm": "gsm"}
BLOCK = 1 << 16  # samples decoded at a time
MP3_FRAME = 1152  # samples, at most: lengths without a header of their own are so exact
MP3_DELAY = (
    3 * MP3_FRAME
)  # samples that an encoder adds and a decoder takes away, at most
# Samples that a byte of a compressed file can hardly hold: beyond, they are counted.
SAMPLES_PER_BYTE = 64
# Share of packets that a decoder may refuse, such as tags between joined recordings.
MAX_BAD_PACKETS = 0.01
# Containers whose headers tell the length exactly enough for a comparison.
_TIMED = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
_TIME_SLACK = 0.2  # seconds, of a codec's delay
# Formats whose lengths have been compared with what is there.
_COMPARED = {"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF"}
# Codecs that keep numbers of any size; lossy ones, which decode to floats as well, are
# made of samples in [-1, 1].
_FLOAT_CODECS = ("pcm_f", "wavpack")
_SOUNDFILE_ERRORS = (soundfile.SoundFileError, RuntimeError, TypeError)
# What helps, by the reason of an AudioError.
REMEDIES = {
    "unreadable": "restore it or remove its line from wav.scp",
    "empty": "fetch it again or remove its line from wav.scp",
    "bad_rate": "the header is damaged: convert the original again",
    "not_finite": "convert the original again",
    "no_channel": "correct the last column of segments",
    "scale": "divide them (16-bit samples by 32768) and write the file again",
    "length": "fetch or convert it again, or accept what is there (without --strict)",
    "segment_past_end": "correct its line in segments, or restore a cut recording",
}


class AudioError(UserError):
    """An audio file cannot be used; the message names the file and the remedy.

    Attributes:
        reason: One word for lists of skipped utterances, such as those of REMEDIES.
    """

    def __init__(
        self, path: str | os.PathLike[str], reason: str, detail: str, remedy: str = ""
    ) -> None:
        super().__init__(f"{path}: {detail}; {remedy or REMEDIES[reason]}")
        self.reason = reason
        self.detail = detail


def undecodable(
    path: str | os.PathLike[str], detail: str, remedy: str = ""
) -> AudioError:
    """Error of a recording that no decoder takes."""
    remedy = remedy or (
        "fetch it again, convert it to wav or flac, or remove its line from wav.scp"
    )
    detail = f"cannot be decoded as audio ({detail})"
    return AudioError(path, "unreadable", detail, remedy)


def split_ark(path: str | os.PathLike[str]) -> tuple[Path, int | None]:
    """Return the file of a recording, and the offset of one in an ark (else None)."""
    text = os.fspath(path)
    match = re.fullmatch(r"(.+):(\d+)", text, re.DOTALL)
    if match and not os.path.exists(text):
        return Path(match[1]), int(match[2])
    return Path(text), None


def _entry_of_ark(path: Path, offset: int) -> tuple[int, int]:
    """Byte range of the audio file at an offset of an ark."""
    file = ByteRange(path)
    with file:
        # Every record is "key <audio>": a wrong offset shows here.
        before, head = file.read_at(offset - 1, 1), file.read_at(offset, 16)
        if head[:5] == b"AUDIO" and len(head) > 6:
            width = head[5]
            start = offset + 6 + width
            size = int.from_bytes(head[6 : 6 + width], "little")
            if before == b" " and 0 < width <= 8 and start + size <= len(file):
                return start, start + size
        elif before == b" " and head[:4] == b"RIFF" and head[8:12] == b"WAVE":
            with ByteRange(path, offset) as rest:
                size = wave_in_ark(rest)
            if size is None:
                raise undecodable(
                    f"{path}:{offset}",
                    f"the WAV file at byte {offset} of this ark tells no length, and "
                    "others follow",
                    remedy="make the ark again of files whose headers tell it",
                )
            if offset + size <= len(file):
                return offset, offset + size
    raise undecodable(
        f"{path}:{offset}",
        f"no audio begins at byte {offset} of this ark",
        remedy="make its table again: it is not of this ark, or the ark is cut off",
    )


class Source(AbstractContextManager):
    """A recording that is open; use it as a context.

    Args:
        path: of a file, or ``file.ark:offset``.

    Attributes:
        rate: in Hz.
        channels: how many.
        samples: per channel; None where only decoding tells.
        is_float: whether samples are stored as numbers that need not lie in [-1, 1].
        note: what is wrong with the file, though it can be read; else empty.

    Raises:
        AudioError: nothing can decode it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._asked = path
        self._path, offset = split_ark(path)
        start, end = (0, None) if offset is None else _entry_of_ark(self._path, offset)
        self._raw = None
        if offset is None:
            self._raw = RAW_FORMATS.get(self._path.suffix.lower())
        with ByteRange(self._path, start, end) as file:
            layout, self._size = find_layout(file), len(file)
        self.note, self._patches = layout.note, layout.patches
        self._links = [(start + first, start + last) for first, last in layout.links]
        # Decoders are faster with a file's name than with an object that reads it.
        whole = offset is None and len(self._links) == 1 and not layout.patches
        self._name = os.fspath(self._path) if whole else None
        self._stack = ExitStack()
        self._sound: soundfile.SoundFile | None = None
        self.samples: int | None = None
        self.is_float = False
        self._said: int | None = None
        try:
            if len(self._links) == 1 and self._raw is None:
                self._sound = self._open_sound(self._links[0], self._stack)
            if self._sound is not None:
                self.rate, self.channels = self._sound.samplerate, self._sound.channels
                self._said = self._sound.frames
                if layout.promised and self._is_plausible(layout.counted):
                    self.samples = self._said
            if self.samples is None:
                self._try_to_decode()
        except BaseException:
            self.close()
            raise

    def _open_sound(
        self, link: tuple[int, int], stack: ExitStack
    ) -> soundfile.SoundFile | None:
        file: Any = os.fsencode(self._name) if self._name else self._range(link, stack)
        try:
            sound = stack.enter_context(soundfile.SoundFile(file))
        except _SOUNDFILE_ERRORS:
            return None
        self.is_float |= sound.subtype in ("FLOAT", "DOUBLE")
        return sound if sound.seekable() else None  # GSM in WAV is not

    def _range(self, link: tuple[int, int], stack: ExitStack) -> ByteRange:
        return stack.enter_context(ByteRange(self._path, *link, self._patches))

    def _is_plausible(self, counted: int | None) -> bool:
        """Whether the length that soundfile tells can be true."""
        if self._sound.subtype.startswith("MPEG"):  # often a guess from the first frame
            return counted is not None and abs(counted - self._said) <= MP3_DELAY
        compressed = self._sound.subtype.startswith("ALAC")
        if self._sound.format in _COMPARED and not compressed:
            return True
        # The last frame of FLAC tells the same, and silence takes next to no bytes.
        bounded = self._sound.format != "FLAC"
        if self._said == 0 or (bounded and self._said > SAMPLES_PER_BYTE * self._size):
            return False
        try:  # whether the last sample is there, and a way back
            self._sound.seek(self._said - 1)
            return len(self._sound.read(1)) == 1 and self._sound.seek(0) == 0
        except _SOUNDFILE_ERRORS:
            return False

    def _try_to_decode(self) -> None:
        """Find rate and channels, and that there are samples."""
        try:
            if next(self.blocks(), None) is None:
                raise undecodable(self._asked, "no samples could be decoded")
        except AudioError:
            if self._said != 0:
                raise
            self.samples = 0  # its header is right

    def read(self, first: int, last: int) -> np.ndarray:
        """Samples first..last of a recording whose length is known.

        Returns:
            float32 (samples, channels), fewer where they are not there.
        """
        try:
            self._sound.seek(first)
            return self._sound.read(last - first, dtype="float32", always_2d=True)
        except _SOUNDFILE_ERRORS as error:
            problem = str(error) or type(error).__name__
            raise undecodable(self._asked, problem) from error

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the recording from its beginning, float32 (samples, channels)."""
        if self.samples is not None:
            for first in range(0, self.samples, BLOCK):
                yield self.read(first, min(first + BLOCK, self.samples))
            return
        self.rate = total = 0
        for link in self._links:
            with ExitStack() as stack:
                for block in self._uniform(self._decode(link, stack)):
                    total += len(block)
                    yield block
        if self._sound is None:
            return
        said = round(self._said * self.rate / self._sound.samplerate)
        if self._said > SAMPLES_PER_BYTE * self._size:
            self._remember("its header tells no length")
        elif abs(total - said) > MP3_FRAME * max(1, self.rate / self._sound.samplerate):
            self._remember(f"its header tells of {said} samples; {total} are there")

    def _uniform(
        self, blocks: Iterator[tuple[int, np.ndarray]]
    ) -> Iterator[np.ndarray]:
        """Yield blocks with the rate and channels of the first of all."""
        stream, rate_before = None, 0
        for rate, block in blocks:
            if not self.rate:
                self.rate, self.channels = rate, block.shape[1]
            if block.shape[1] != self.channels:
                block = np.repeat(block.mean(1, keepdims=True), self.channels, 1)
            if rate != self.rate:
                if stream is None or rate != rate_before:
                    stream = soxr.ResampleStream(rate, self.rate, self.channels)
                    rate_before = rate
                block = stream.resample_chunk(np.ascontiguousarray(block))
            yield block
        if stream is not None:
            rest = np.zeros((0, self.channels), np.float32)
            yield stream.resample_chunk(rest, last=True)

    def _decode(
        self, link: tuple[int, int], stack: ExitStack
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield rates and samples of one of the recordings that are joined."""
        # soundfile knows best where a link of Ogg begins and ends.
        sound = self._open_sound(link, stack) if len(self._links) > 1 else None
        if sound is None or sound.frames > SAMPLES_PER_BYTE * self._size:
            file = self._name or self._range(link, stack)
            yield from self._decode_av(file)
            return
        while len(block := sound.read(BLOCK, "float32", always_2d=True)):
            yield sound.samplerate, block

    def _decode_av(self, file: str | ByteRange) -> Iterator[tuple[int, np.ndarray]]:
        """Yield rates and samples (n, channels) of a file, as PyAV decodes it."""
        packets = bad = samples = rate = 0
        said = None
        try:
            with av.open(file, format=self._raw) as container:
                if not container.streams.audio:
                    raise undecodable(self._asked, "it holds no audio")
                stream = container.streams.audio[0]
                if container.format.name in _TIMED and container.duration:
                    said = container.duration / av.time_base
                to_float, kind, delay = None, None, 0
                codec = stream.codec_context
                if (container.format.name, codec.name) == ("ogg", "opus"):
                    # Its positions are wrong, as soundfile does not read it: nothing
                    # is left out by them, only what the codec puts first.
                    codec.flags2 |= av.codec.context.Flags2.skip_manual
                    delay = codec.delay
                for packet in container.demux(stream):
                    packets += 1
                    try:
                        frames = packet.decode()
                    except av.error.InvalidDataError:
                        bad += 1
                        continue
                    for frame in frames:
                        new = frame.format.name, frame.layout.name, frame.sample_rate
                        if new != kind:  # at the beginning, or within radio streams
                            to_float, kind = av.AudioResampler("fltp", rate=new[2]), new
                            if codec.name.startswith(_FLOAT_CODECS):
                                self.is_float |= new[0].startswith(("flt", "dbl"))
                        rate = frame.sample_rate
                        for out in to_float.resample(frame):
                            block = out.to_ndarray().T[delay:]
                            delay -= min(delay, out.samples)
                            samples += len(block)
                            yield rate, block
        except av.error.InvalidDataError as error:  # WavPack, ALAC: a packet is cut
            if not samples:
                raise _explain(self._asked, error, file) from error
            self._remember(f"it breaks off or is damaged at {samples / rate:.2f} s")
        except (av.error.FFmpegError, ValueError, IndexError) as error:
            raise _explain(self._asked, error, file) from error
        if bad > max(1, MAX_BAD_PACKETS * packets) or not samples:
            problem = f"{bad} of {packets} packets are damaged"
            raise _explain(self._asked, problem, file)
        if bad:
            self._remember(f"{bad} of {packets} packets are damaged and left out")
        if said is not None and abs(samples / rate - said) > _TIME_SLACK:
            self._remember(
                f"its header tells of {said:.2f} s; {samples / rate:.2f} s are there"
            )

    def _remember(self, note: str) -> None:
        if note not in self.note:
            self.note = f"{self.note}; {note}" if self.note else note

    def close(self) -> None:
        """Close the file."""
        self._stack.close()

    def __exit__(self, *unused: object) -> None:
        self.close()


class DecodedWindow:
    """A recording of unknown length, decoded as far as it is asked for.

    What lies before the piece that was asked for last is forgotten, so that pieces in
    the order of time need no more memory than the longest of them.

    Attributes:
        length: samples, once the end has been met; else None.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._restart()

    def _restart(self) -> None:
        self._blocks = self._source.blocks()
        self._held: deque[np.ndarray] = deque()
        self._start = self._end = 0
        self.length: int | None = None

    def read(self, first: int, last: int | None) -> np.ndarray:
        """Samples first..last (None: to the end), fewer where they are not there."""
        if first < self._start:
            self._restart()
        # A little further, so that a piece that ends with the recording meets its end,
        # where a header shows that is wrong.
        margin = self._source.rate // 10
        while self.length is None and (last is None or self._end <= last + margin):
            block = next(self._blocks, None)
            if block is None:
                self.length = self._end
                break
            self._held.append(block)
            self._end += len(block)
            self._forget(first)
        self._forget(first)
        if not self._held:
            return np.zeros((0, self._source.channels), np.float32)
        stop = None if last is None else max(0, last - self._start)
        return np.concatenate(self._held)[max(0, first - self._start) : stop]

    def _forget(self, first: int) -> None:
        while self._held and self._start + len(self._held[0]) <= first:
            self._start += len(self._held.popleft())


def _explain(
    path: str | os.PathLike[str], error: Exception | str, file: str | ByteRange
) -> AudioError:
    """The error of a recording that PyAV cannot decode, with what helps against it."""
    if isinstance(error, AudioError):
        return error
    remedy = ""
    if isinstance(error, (av.error.PatchWelcomeError, av.error.DecoderNotFoundError)):
        remedy = "its codec is not known here: decode it with a program that knows it, "
        remedy += "such as another build of ffmpeg, and name the wav file"
    with ByteRange(file) if isinstance(file, str) else nullcontext(file) as opened:
        if opened.read_at(0, 7) == b"NIST_1A":  # shorten, of Fisher and Switchboard
            remedy = "SPHERE files in a coding such as shorten are decoded with "
            remedy += "sph2pipe (sph2pipe -f wav IN.sph OUT.wav): name the wav file"
    return undecodable(path, str(error), remedy)

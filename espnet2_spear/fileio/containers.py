"""Compare the length that a recording's container promises with the bytes there.

Decoders believe headers. Recorders that were killed, pipes and radio streams leave
headers that are wrong: a size that was never filled in, a size a few bytes off, the
length of the first of several joined recordings. Here a file's bytes are looked at
before a decoder sees them.
"""

from __future__ import annotations

import io
import os
import re
import struct
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import BinaryIO, NamedTuple

# Sizes of writers that cannot seek back: 0, or about the largest number there is.
_UNKNOWN_32 = 0x7FFF0000
_UNKNOWN_64 = 1 << 62
_TAIL = 1 << 17  # bytes at the end of a FLAC file that hold its last frame
_OGG_PACKET = 8192  # samples, at most


Links = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Layout:
    """Layout of a file, by which it can be read.

    Attributes:
        links: byte ranges (start, end) of recordings that follow one another.
        patches: (offset, bytes) to be read instead of what a header holds.
        promised: whether the length that a decoder tells of the header can be true.
        counted: samples as the headers of frames count them; None: nothing counts.
        note: what is wrong, for messages; empty where nothing is.
    """

    links: Links
    patches: tuple[tuple[int, bytes], ...] = ()
    promised: bool = True
    counted: int | None = None
    note: str = ""


class ByteRange(io.RawIOBase):
    """Part of a file as a file of its own, with other bytes at some places.

    Args:
        path: of the file.
        start: first byte.
        end: last byte + 1; None: the file's end.
        patches: (offset from ``start``, bytes) to be read instead.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        start: int = 0,
        end: int | None = None,
        patches: tuple[tuple[int, bytes], ...] = (),
    ) -> None:
        self._file: BinaryIO = open(path, "rb")
        there = os.fstat(self._file.fileno()).st_size
        self._start, self._end = start, there if end is None else min(end, there)
        self._patches, self._at = patches, 0

    def __len__(self) -> int:
        return max(0, self._end - self._start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self)}
        self._at = max(0, base[whence] + offset)
        return self._at

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        length = min(len(view), len(self) - self._at)
        if length <= 0:  # sizes in headers lead anywhere
            return 0
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view[:length])
        for offset, content in self._patches:
            first = max(offset, self._at)
            last = min(offset + len(content), self._at + count)
            if first < last:
                new = content[first - offset : last - offset]
                view[first - self._at : last - self._at] = new
        self._at += count
        return count

    def read_at(self, offset: int, size: int) -> bytes:
        """Read from a place, whatever the position is."""
        self.seek(offset)
        return self.read(size)

    def find(self, mark: bytes, offset: int) -> int:
        """Place of the next ``mark`` from ``offset`` on, -1 if there is none."""
        while content := self.read_at(offset, 1 << 20):
            if (place := content.find(mark)) >= 0:
                return offset + place
            if len(content) <= len(mark):
                break
            offset += len(content) - len(mark) + 1
        return -1

    def close(self) -> None:
        self._file.close()
        super().close()


def find_layout(file: ByteRange) -> Layout:
    """Look at the container of a recording."""
    head = file.read_at(0, 64)
    whole = ((0, len(file)),)
    if head[:4] == b"OggS":
        links, promised, note = _ogg_links(file)
        return Layout(links or whole, promised=promised, note=note)
    if head[4:8] == b"ftyp":
        return _joined(_mp4_links(file), promised=False)
    tag = _id3_size(head)
    if file.read_at(tag, 4) == b"fLaC":
        head = file.read_at(tag, 64)
        if tag == 0 and _flac_ends_as_promised(file, head):
            return Layout(whole)
        layout = _joined(_flac_links(file) or whole, promised=False)
        if _flac_total(head) == 0 and not layout.note:
            layout = replace(layout, note="its header tells no length")
        return layout
    if tag or (head[:1] == b"\xff" and head[1:2] >= b"\xe0"):
        counted, joined = _mp3_samples(file, tag)
        note = "recordings are joined in it" if joined else ""
        promised = counted is not None and not joined
        return Layout(whole, promised=promised, counted=counted, note=note)
    if len(links := _chunk_links(file)) > 1:
        return _joined(links, promised=False)
    if head[:7] == b"NIST_1A":
        return Layout(whole, note=_sphere_note(file, head))
    samples = _find_samples(file, head)
    return Layout(whole) if samples is None else _compare(file, samples, whole)


def wave_in_ark(file: ByteRange) -> int | None:
    """Bytes of the WAV file at the beginning of what is an ark from there on.

    A WAV file that was never finalised is the rest of the ark, as in Kaldi.

    Returns:
        None where that is not known, as other entries follow. More than there is where
        the ark is cut off.
    """
    size = int.from_bytes(file.read_at(4, 4), "little")
    if 0 < size < _UNKNOWN_32:
        return 8 + size
    samples = _find_samples(file, file.read_at(0, 64))
    if samples is not None and not samples.unknown:
        return samples.start + samples.size
    marks = (b" RIFF", b" AUDIO")
    return None if any(file.find(mark, 8) >= 0 for mark in marks) else len(file)


def _joined(links: Links, promised: bool) -> Layout:
    note = f"{len(links)} recordings are joined in it" if len(links) > 1 else ""
    return Layout(links, promised=promised, note=note)


class _Form(NamedTuple):
    """How a container of chunks is written."""

    first: int  # chunk's place
    header: str  # id and size of a chunk
    name: bytes  # of the chunk of samples
    padding: int  # chunks begin at multiples of it
    counts_header: bool = False  # whether a size includes the chunk's header


_WAVE64_DATA = bytes.fromhex("64617461f3acd3118cd100c04f8edb8a")
_WAVE = _Form(12, "<4sI", b"data", 2)
_FORMS = {
    b"RIFF": _WAVE,
    b"RF64": _WAVE,
    b"BW64": _WAVE,
    b"RIFX": _Form(12, ">4sI", b"data", 2),
    b"FORM": _Form(12, ">4sI", b"SSND", 2),
    b"caff": _Form(8, ">4sQ", b"data", 1),
    b"riff": _Form(40, "<16sQ", _WAVE64_DATA, 8, True),
}


class _Samples(NamedTuple):
    """The samples of a file: their first byte, their size and where that is written."""

    start: int
    size: int
    size_at: int
    size_format: str
    overhead: int = 0  # bytes before the first that the size counts
    padding: int = 1
    block: int = 4  # bytes of a sample frame, or of a compressed block; 4: unknown

    @property
    def end(self) -> int:
        return self.start + self.size + -self.size % self.padding

    @property
    def unknown(self) -> bool:
        wide = self.size_format[-1] == "Q"
        return self.size == 0 or self.size >= (_UNKNOWN_64 if wide else _UNKNOWN_32)


def _find_samples(file: ByteRange, head: bytes) -> _Samples | None:
    if head[:4] == b".snd" and len(head) >= 24:
        start, size, coding, _, channels = struct.unpack(">5I", head[4:24])
        block = channels * _AU_BYTES.get(coding, 0) or 4
        return _Samples(start, size, 8, ">I", block=block)
    form = _FORMS.get(head[:4])
    if form is None:
        return None
    at, block, wide = form.first, 4, None
    length = struct.calcsize(form.header)
    while len(content := file.read_at(at, length)) == length:
        name, size = struct.unpack(form.header, content)
        overhead = length if form.counts_header else 0
        size_at, size_format = at + len(name), form.header[0] + form.header[-1]
        at += length
        if name == form.name:
            if wide is not None:  # RF64: the size stands in a chunk of its own
                size_at, size_format = wide, "<Q"
                (size,) = struct.unpack("<Q", file.read_at(wide, 8))
            return _Samples(
                at,
                max(size - overhead, 0),
                size_at,
                size_format,
                overhead,
                form.padding,
                block,
            )
        if name == b"ds64":
            wide = at + 8
        if name[:4] in (b"fmt ", b"COMM", b"desc"):
            block = _block(file.read_at(at, 20), name, form.header[0]) or block
        size = max(size - overhead, 0)
        at += size + -size % form.padding
    return None


# Bytes of a sample by its coding in the header of AU: mu-law, PCM, float, A-law.
_AU_BYTES = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}


def _block(chunk: bytes, name: bytes, order: str) -> int:
    """Bytes of a sample frame or block as the chunk of the format tells; 0: unknown."""
    form = {b"fmt ": "12xH", b"COMM": "H4xH", b"desc": "16xI"}[name[:4]]
    if len(chunk) < struct.calcsize(order + form):
        return 0
    first, *bits = struct.unpack_from(order + form, chunk)
    return first * -(-bits[0] // 8) if bits else first


def _compare(file: ByteRange, samples: _Samples, whole: Links) -> Layout:
    """Let a decoder see the size that is there where the header says another."""
    said, there = samples.size, len(file) - samples.start
    if there <= 0 or said == there:
        return Layout(whole)
    if samples.end <= len(file) and (said > 0 or samples.padding > 1):
        if _is_chunk(file, samples):
            return Layout(whole)
    if samples.unknown:
        note = f"its header tells no length; {there} bytes of audio are there"
    else:
        note = f"its header tells of {said} bytes of audio; {there} are there"
    if abs(said - there) <= samples.block:
        note = ""
    size = there + samples.overhead
    if samples.size_format[-1] == "I":
        size = min(size, 0xFFFFFFFF)
    patch = struct.pack(samples.size_format, size)
    return Layout(whole, ((samples.size_at, patch),), note=note)


def _is_chunk(file: ByteRange, samples: _Samples) -> bool:
    """Whether another chunk, or nothing worth a name, follows the samples."""
    if samples.size_at == 8 and samples.size_format == ">I":  # AU has no others
        return False
    left, end = len(file) - samples.end, samples.start + samples.size
    padding = file.read_at(end, samples.end - end)
    if len(padding) > samples.block and any(padding):  # these are samples
        return False
    if left < 8:
        return left <= samples.block
    content = file.read_at(samples.end, 24)
    order = "little" if samples.size_format[0] == "<" else "big"
    sizes = (content[4:8], content[4:12], content[16:24])
    printable = all(32 <= byte < 127 for byte in content[:4])
    return printable and any(int.from_bytes(s, order) <= left for s in sizes)


def _sphere_note(file: ByteRange, head: bytes) -> str:
    """What is wrong with the length in a SPHERE header, which decoders do not read."""
    size = int(text) if (text := head[8:16].strip()).isdigit() else 1024
    fields = re.findall(rb"(?m)^(\w+) -\w+ +(\S+)", file.read_at(0, size))
    found = {key: int(text) for key, text in fields if text.lstrip(b"-").isdigit()}
    width = found.get(b"sample_n_bytes", 2)
    if dict(fields).get(b"sample_coding", b"")[:4] in (b"ulaw", b"alaw"):
        width = 1  # libsndfile writes 2 there
    said, frame = found.get(b"sample_count", -1), found.get(b"channel_count", 1) * width
    there = (len(file) - size) // max(1, frame)
    if abs(said - there) <= 1:
        return ""
    return f"its header tells of {said} samples; {there} are there"


def _chunk_links(file: ByteRange) -> Links:
    """Byte ranges of WAV, AIFF or like files that were put one behind the other."""
    starts, at = [], 0
    while len(content := file.read_at(at, 24)) >= 8:
        if content[:4] in _FORMS:
            starts.append(at)
            form = _FORMS[content[:4]]
            at += form.first
            continue
        if not starts or not all(32 <= byte < 127 for byte in content[:4]):
            break
        length = struct.calcsize(form.header)
        _, size = struct.unpack(form.header, content[:length].ljust(length, b"\0"))
        at += max(size, length) if form.counts_header else size + length
        # Not all writers fill up the last chunk.
        behind = file.read_at(at, 12)
        new = [i for i in range(8) if behind[i : i + 4] in _FORMS]
        at += new[0] if new else -(at - starts[-1]) % form.padding
    return tuple(pairwise([*starts, len(file)]))


def _mp4_links(file: ByteRange) -> Links:
    """The same of MP4 files, each of which begins with its type."""
    starts, at, size = [], 0, 8
    while size >= 8 and len(head := file.read_at(at, 16)) >= 8:
        if head[4:8] == b"ftyp":
            starts.append(at)
        size = int.from_bytes(head[:4], "big")
        if size == 1:
            size = int.from_bytes(head[8:], "big")
        at += size
    return tuple(pairwise([*starts, len(file)]))


def _ogg_links(file: ByteRange) -> tuple[Links, bool, str]:
    """Byte ranges of the links of an Ogg stream: each begins with first pages.

    And whether the position of the last page can be the length: those of one link rise
    from page to page, and at last not faster than before. And what is wrong.
    """
    starts, at, first_before, rise, ended = [], 0, False, True, False
    positions: dict[bytes, int] = {}  # of each stream within a link
    densities: list[float] = []  # samples a packet, of all pages
    while len(head := file.read_at(at, 27 + 255)) >= 27:
        if head[:4] != b"OggS":  # damaged: look for the next page
            at = file.find(b"OggS", at + 1)
            if at < 0:
                break
            continue
        first = bool(head[5] & 2)
        if first and not first_before:
            starts.append(at)
            positions = {}
        first_before = first
        position = int.from_bytes(head[6:14], "little", signed=True)
        lengths = head[27 : 27 + head[26]]
        if position >= 0:  # else no packet ends in this page
            gain = position - positions.get(head[14:18], 0)
            packets = sum(n < 255 for n in lengths)
            # Headers are at 0, and the last page's packet may be empty.
            may_stay = position == 0 or packets <= bool(head[5] & 4)
            rise &= gain > 0 or (gain == 0 and may_stay)
            densities.append(gain / max(1, packets))
            positions[head[14:18]] = position
        at += 27 + head[26] + sum(lengths)
        ended = bool(head[5] & 4) and at <= len(file) and position >= 0
    *before, last = densities or [0.0]
    rise &= any(positions.values())
    promised = rise and last <= (2 * max(before, default=0) or _OGG_PACKET)
    note = "" if rise else "the positions that its pages tell do not rise"
    if not ended:
        note = "it breaks off: the last page of its stream is missing"
    return tuple(pairwise([*starts, len(file)])), promised and len(starts) < 2, note


def _id3_size(head: bytes) -> int:
    """Bytes of an ID3 tag at the beginning of a file, 0: there is none."""
    if head[:3] != b"ID3":
        return 0
    size = 0
    for byte in head[6:10]:
        size = size << 7 | byte & 0x7F
    return 10 + size


# ISO 11172-3 and 13818-3, 2.4.2.3: kbit/s by the code of a frame's header.
_MP3_RATES = {
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_MP3_RATES[2, 3] = _MP3_RATES[2, 2]
_TAGS = (b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"\0\0\0\0")  # behind the last frame


def _mp3_frame(head: bytes) -> tuple[int, int]:
    """Bytes and samples of an MP3 frame (of layer I to III); zeros if it is none."""
    if len(head) < 4 or head[0] != 0xFF or head[1] < 0xE0:
        return 0, 0
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    rate_code, hertz_code = head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 4 or rate_code in (0, 15) or hertz_code == 3:
        return 0, 0
    generation = 1 if version == 3 else 2
    hertz = (44100, 48000, 32000)[hertz_code] // {3: 1, 2: 2, 0: 4}[version]
    rate, padding = _MP3_RATES[generation, layer][rate_code - 1], head[2] >> 1 & 1
    if layer == 1:
        return (12000 * rate // hertz + padding) * 4, 384
    samples = 576 if (generation, layer) == (2, 3) else 1152
    return samples * 125 * rate // hertz + padding, samples


def _mp3_samples(file: ByteRange, at: int) -> tuple[int | None, bool]:
    """Samples of all frames of an MP3 file, and whether recordings are joined in it.

    The number of frames in a header may be wrong or missing, and what decoders guess
    then from the first frame's rate is far off where the rate varies.

    Returns:
        None for what is no row of frames to the end.
    """
    samples, headers = 0, 0
    buffered = io.BufferedReader(file, 1 << 16)
    while True:
        buffered.seek(at)
        head = buffered.read(48)
        length, count = _mp3_frame(head)
        if length == 0 and (length := _id3_size(head)) == 0:
            break
        if b"Xing" in head or b"Info" in head:  # a frame that describes, without sound
            headers += 1
        else:
            samples += count
        at += length
    buffered.detach()
    ended = at >= len(file) or head.startswith(_TAGS)
    return samples if ended else None, headers > 1


def _flac_ends_as_promised(file: ByteRange, head: bytes) -> bool:
    """Whether the last frame of a FLAC file ends at the length in its header."""
    total = _flac_total(head)
    block = int.from_bytes(head[10:12], "big")
    longest = int.from_bytes(head[15:18], "big")
    size = len(file)
    tail = file.read_at(max(0, size - _TAIL), _TAIL)
    at = len(tail)
    while (at := tail.rfind(b"\xff", 0, at)) >= 0:
        found = _flac_frame(tail[at : at + 16], block)
        if found is not None:
            # Frames of all recordings before it would not be so few if joined.
            before = size - len(tail) + at - _flac_audio(file)
            fits = longest == 0 or before <= (found[0] // max(block, 1) + 1) * longest
            return total > 0 and sum(found) == total and fits
    return False


def _flac_links(file: ByteRange) -> Links:
    """Byte ranges of FLAC files that were put one behind the other."""
    starts, at = [], 0
    while (at := file.find(b"fLaC", at)) >= 0:
        if file.read_at(at + 4, 4) in (b"\0\0\0\x22", b"\x80\0\0\x22"):
            starts.append(at)
        at += 4
    return tuple(pairwise([*starts, len(file)]))


def _flac_total(head: bytes) -> int:
    """Samples of a FLAC file as its header tells them; 0: unknown."""
    return int.from_bytes(head[21:26], "big") & (1 << 36) - 1


def _flac_audio(file: ByteRange) -> int:
    """Where the frames of a FLAC file begin."""
    at = 4
    while len(head := file.read_at(at, 4)) == 4:
        at += 4 + int.from_bytes(head[1:], "big")
        if head[0] & 0x80:
            break
    return at


# Samples of a frame by the code in its header (RFC 9639, 9.1.1). The number itself
# follows 6 and 7; 0 is reserved.
_FLAC_BLOCKS = {
    1: 192,
    **{code: 576 << (code - 2) for code in range(2, 6)},
    **{code: 1 << code for code in range(8, 16)},
}


def _flac_frame(head: bytes, block: int) -> tuple[int, int] | None:
    """First sample and number of samples of a frame, None if it is none."""
    if len(head) < 6 or head[1] & 0xFE != 0xF8:
        return None
    code, length = head[2] >> 4, 1
    while length < 7 and head[4] >= 0x80 and head[4] & 0x80 >> length:
        length += 1
    number = head[4] if head[4] < 0x80 else head[4] & (0x7F >> length)
    for byte in head[5 : 4 + length]:
        number = number << 6 | byte & 0x3F
    at = 4 + length
    samples = _FLAC_BLOCKS.get(code, 0)
    if code in (6, 7):
        width = code - 5
        samples = int.from_bytes(head[at : at + width], "big") + 1
        at += width
    at += {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)
    crc = 0
    for byte in head[:at]:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ 7 if crc & 0x80 else crc << 1) & 0xFF
    if at >= len(head) or crc != head[at] or samples == 0:
        return None
    return (number if head[1] & 1 else number * block), samples

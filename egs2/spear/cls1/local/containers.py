"""Sounds inside the files of a game and of a soundfont."""

import struct
from collections.abc import Iterator
from pathlib import Path

_TOP_BIT = 0x80000000
_SHDR = struct.Struct("<20sIIIIIBbHH")


class ContainerError(ValueError):
    """A file is not what its name says, or is cut off."""


def read_cat(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (caption, WAV file) of a sound file of OpenTTD.

    It begins with pairs of offset and size (uint32, little endian; the top bit of the
    first marks the form with captions). At an offset stand the caption's length in a
    byte, the caption and the WAV file.

    Raises:
        ContainerError: an entry lies outside the file or holds no WAV.
    """
    data = path.read_bytes()
    if len(data) < 8:
        raise ContainerError(f"{path}: is cut off; unpack it again")
    count = (struct.unpack_from("<I", data)[0] & ~_TOP_BIT) // 8
    for index in range(count):
        if 8 * index + 8 > len(data):
            raise ContainerError(f"{path}: is cut off; unpack it again")
        offset, size = struct.unpack_from("<II", data, 8 * index)
        offset &= ~_TOP_BIT
        start = offset + 1 + data[offset] if offset < len(data) else len(data)
        sound = data[start : start + size]
        if len(sound) < size or sound[:4] != b"RIFF":
            raise ContainerError(f"{path}: entry {index} holds no WAV; unpack it again")
        yield data[offset + 1 : start].rstrip(b"\0").decode("utf-8", "replace"), sound


def read_sf3(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, Ogg Vorbis file) of the samples of a compressed soundfont.

    As in SoundFont 2, but the chunk smpl holds Ogg files, and the sample headers' start
    and end are byte offsets in it. Chunks of odd length need not be padded.

    Raises:
        ContainerError: no soundfont, or a sample that is no Ogg file.
    """
    data = path.read_bytes()
    if data[:4] != b"RIFF" or data[8:12] != b"sfbk":
        raise ContainerError(f"{path}: is no soundfont; unpack it again")
    found = {}
    for tag, start, size in _chunks(path, data, 12, len(data)):
        if tag == b"LIST":
            for inner, first, length in _chunks(path, data, start + 4, start + size):
                found[inner] = data[first : first + length]
    if b"smpl" not in found or b"shdr" not in found:
        raise ContainerError(f"{path}: has no samples; unpack it again")
    headers = found[b"shdr"]
    for at in range(0, len(headers) - 2 * _SHDR.size + 1, _SHDR.size):  # last: the end
        name, start, end, *_ = _SHDR.unpack_from(headers, at)
        sound = found[b"smpl"][start:end]
        if sound[:4] != b"OggS":
            raise ContainerError(f"{path}: sample {name!r} is no Ogg file")
        yield name.partition(b"\0")[0].decode("latin-1").strip(), sound


def _chunks(
    path: Path, data: bytes, start: int, end: int
) -> Iterator[tuple[bytes, int, int]]:
    """Tag, first byte and length of the RIFF chunks in a range."""
    while start + 8 <= end:
        tag, size = struct.unpack_from("<4sI", data, start)
        if start + 8 + size > end:
            raise ContainerError(f"{path}: chunk {tag!r} is cut off; unpack it again")
        yield tag, start + 8, size
        start += 8 + size
        if start < end and data[start] == 0:  # padding
            start += 1

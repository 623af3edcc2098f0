"""Sounds inside the files of a game and of a soundfont."""

import struct
from collections.abc import Iterator
from pathlib import Path

from espnet2_spear.errors import UserError

_TOP_BIT = 0x80000000
_SHDR = struct.Struct("<20sIIIIIBbHH")
_PHDR = struct.Struct("<20sHHHIII")
_INST = struct.Struct("<20sH")
_PAIR = struct.Struct("<HH")
_INSTRUMENT, _SAMPLE_ID = 41, 53  # generators


class ContainerError(UserError):
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


def read_sf3(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """Yield (name, key, Ogg Vorbis file) of the samples of a compressed soundfont.

    The key is the MIDI number of the recorded note; 60, too, where there is none.

    As in SoundFont 2, but the chunk smpl holds Ogg files, and the sample headers' start
    and end are byte offsets in it. Chunks of odd length need not be padded.

    Raises:
        ContainerError: no soundfont, or a sample that is no Ogg file.
    """
    found = _soundfont(path)
    headers = found[b"shdr"]
    for at in range(0, len(headers) - 2 * _SHDR.size + 1, _SHDR.size):  # last: the end
        name, start, end, _, _, _, key, *_ = _SHDR.unpack_from(headers, at)
        sound = found[b"smpl"][start:end]
        if sound[:4] != b"OggS":
            raise ContainerError(f"{path}: sample {name!r} is no Ogg file")
        yield name.partition(b"\0")[0].decode("latin-1").strip(), key, sound


def read_presets(path: Path) -> dict[int, set[tuple[int, int]]]:
    """Return sample -> (bank, program) of all presets that play it.

    A preset (chunk phdr) has zones (pbag), whose generators (pgen) name an instrument
    (generator 41); its zones (inst, ibag) have generators (igen) that name a sample
    (53). Every header says where its zones begin, and the next one where they end.

    Raises:
        ContainerError: no soundfont, or one that is cut off.
    """
    found = _soundfont(path)
    try:
        instruments = _zones(found, b"inst", _INST, b"ibag", b"igen", _SAMPLE_ID)
        presets = _zones(found, b"phdr", _PHDR, b"pbag", b"pgen", _INSTRUMENT)
        players: dict[int, set[tuple[int, int]]] = {}
        for (_, program, bank, *_), used in presets:
            for number in used:
                for sample in instruments[number][1]:
                    players.setdefault(sample, set()).add((bank, program))
    except (KeyError, IndexError, struct.error) as error:
        raise ContainerError(f"{path}: damaged ({error!r}); unpack it again") from None
    return players


def _zones(
    found: dict[bytes, bytes],
    heads: bytes,
    head: struct.Struct,
    bags: bytes,
    generators: bytes,
    wanted: int,
) -> list[tuple[tuple, list[int]]]:
    """(header, amounts of one generator in its zones) of presets or instruments."""
    headers = list(head.iter_unpack(found[heads]))
    zones = [first for first, _ in _PAIR.iter_unpack(found[bags])]
    values = list(_PAIR.iter_unpack(found[generators]))
    place = 3 if heads == b"phdr" else 1  # of the first zone, in a header
    return [
        (
            this,
            [
                amount
                for zone in range(this[place], following[place])
                for kind, amount in values[zones[zone] : zones[zone + 1]]
                if kind == wanted
            ],
        )
        for this, following in zip(headers, headers[1:], strict=False)
    ]


def _soundfont(path: Path) -> dict[bytes, bytes]:
    """Chunks of a soundfont by tag."""
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
    return found


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

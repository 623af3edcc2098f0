#!/usr/bin/env python3
"""Voices of a game's characters out of its archive, as a data directory.

The archive of "Flight of the Amazon Queen" begins with "QTBL", a version of 6 bytes, 2
bytes and the kind of compression (1: MP3); then the number of members (16 bits) and, of
each, name (12 bytes), bundle (8 bits), offset and size (32 bits); all big-endian. A
dialogue ``PERSON<n>.DOG`` has, after 20 bytes, three 16-bit numbers, the third of which
is its key. A spoken clip is called ``<key><string><speaker><segment>.SB``: two decimal
digits, four hexadecimal ones, P for the person of that dialogue or J for the player's
character, and a hexadecimal digit. Other clips (cut-scenes) do not tell who speaks.

Written besides the usual tables: `labels` (utterance and character) and `groups` (the
segments of one string, which a split keeps together).
"""

import argparse
import logging
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sounds import order, package_parser

from espnet2_spear.fileio.audio import AudioError, audio_info
from espnet2_spear.fileio.datadir import DataDirError, Entry, write_entries, write_table
from espnet2_spear.fileio.explain import command

ARCHIVE = "usr/share/scummvm/flight-of-the-amazon-queen/queen.1c"
MP3 = 1
PLAYER = "JOE"
_HEAD = struct.Struct(">4s6s2sBH")
_MEMBER = struct.Struct(">12sBII")
_KEY_AT = 20 + 4  # within a dialogue
_CLIP = re.compile(r"(\d\d)([0-9A-F]{4})([PJ])[0-9A-F]\.SB")
_DIALOGUE = re.compile(r"([A-Z]+)\d*\.DOG")


class Clip(NamedTuple):
    """A spoken clip: its member's name, who speaks, which string, and where it is."""

    name: str
    speaker: str
    string: str
    offset: int
    size: int


def read_members(path: Path) -> dict[str, tuple[int, int]]:
    """Return name -> (offset, size).

    Raises:
        DataDirError: not this archive, without MP3 clips, or cut off.
    """
    if not path.is_file():
        raise DataDirError(f"{path}: no such file; run stage 1 of run.sh again")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size or head[:4] != b"QTBL":
            raise DataDirError(f"{path}: is not the game's archive; unpack it again")
        *_, compression, count = _HEAD.unpack(head)
        if compression != MP3:
            raise DataDirError(f"{path}: its clips are not MP3 but kind {compression}")
        table = file.read(count * _MEMBER.size)
    members = {}
    for name, _, offset, length in _MEMBER.iter_unpack(
        table[: len(table) // _MEMBER.size * _MEMBER.size]
    ):
        if offset + length <= size:
            members[name.rstrip(b"\0").decode("latin-1")] = (offset, length)
    if len(members) < count:
        raise DataDirError(f"{path}: is cut off; unpack it again")
    return members


def read_clips(path: Path) -> Iterator[Clip]:
    """Yield the clips of which the speaker is known."""
    members = read_members(path)
    persons = {}
    with path.open("rb") as file:
        for name, (offset, _) in members.items():
            dialogue = _DIALOGUE.fullmatch(name)
            if dialogue:
                file.seek(offset + _KEY_AT)
                persons[int.from_bytes(file.read(2), "big")] = dialogue[1]
    for name, (offset, size) in members.items():
        clip = _CLIP.fullmatch(name)
        if clip and int(clip[1]) in persons:
            speaker = PLAYER if clip[3] == "J" else persons[int(clip[1])]
            yield Clip(name[:-3], speaker, clip[1] + clip[2], offset, size)


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = package_parser(__doc__)
    parser.add_argument("--num_clips", type=int, default=60, help="of each speaker")
    parser.add_argument("--min_seconds", type=float, default=1.0)
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Write the data directory: speakers with enough clips, so many of each.

    Raises:
        DataDirError: see :func:`read_members`; or fewer than two speakers are left.
    """
    archive = args.root / ARCHIVE
    folder = args.out_dir / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    chosen: dict[str, list[tuple[Clip, Path]]] = {}
    found = sorted(read_clips(archive), key=order)
    with archive.open("rb") as file:
        for clip in found:
            clips = chosen.setdefault(clip.speaker, [])
            if len(clips) == args.num_clips:
                continue
            path = folder / f"{clip.name}.mp3"
            file.seek(clip.offset)
            path.write_bytes(file.read(clip.size))
            try:
                long_enough = audio_info(path).seconds >= args.min_seconds
            except AudioError as error:
                logging.warning("%s", error)
                long_enough = False
            if long_enough:
                clips.append((clip, path))
            else:
                path.unlink()
    spoken, groups = [], {}
    for speaker, clips in chosen.items():
        if len(clips) < args.num_clips:
            continue
        for clip, path in clips:
            utt, file = f"{speaker}-{clip.name}", str(path.absolute())
            spoken.append(Entry(utt, file, speaker, "speech", labels=speaker))
            groups[utt] = clip.string
    speakers = sorted({entry.speaker for entry in spoken})
    if len(speakers) < 2:
        raise DataDirError(
            f"{archive}: fewer than two speakers have {args.num_clips} clips; lower "
            "--num_clips"
        )
    write_entries(sorted(spoken), args.out_dir)
    write_table(args.out_dir / "groups", groups)
    logging.info(
        "%d speakers, %d clips each: %s",
        *(len(speakers), args.num_clips, " ".join(speakers)),
    )


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Unpack the audio files of zip archives (also .pk3), and nothing else of them."""

import argparse
import logging
import shutil
import zipfile
from pathlib import Path, PurePosixPath

from espnet2_spear.fileio.atomic import atomic
from espnet2_spear.fileio.audio import AUDIO_SUFFIXES
from espnet2_spear.fileio.explain import command

MAX_MEMBER = 256 * 1024**2  # bytes; a larger member is not a sound of a collection


def unzip(archive: Path, out_dir: Path) -> int:
    """Write the audio members below ``out_dir``; return how many there are.

    Files that are there in full are kept.

    Raises:
        ValueError: a member's name leads outside ``out_dir``, or it is too large.
        zipfile.BadZipFile: the archive is damaged.
    """
    count = 0
    with zipfile.ZipFile(archive) as members:
        for member in members.infolist():
            name = PurePosixPath(member.filename)
            if member.is_dir() or name.suffix.lower() not in AUDIO_SUFFIXES:
                continue
            if name.is_absolute() or ".." in name.parts:
                raise ValueError(f"{archive}: unsafe member name {member.filename!r}")
            if member.file_size > MAX_MEMBER:
                raise ValueError(f"{archive}: {member.filename!r} is too large")
            path = out_dir / name
            count += 1
            if path.exists() and path.stat().st_size == member.file_size:
                continue
            with members.open(member) as source, atomic(path) as target:
                shutil.copyfileobj(source, target)
    return count


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out_dir", type=Path, required=True)
    parser.add_argument("archives", type=Path, nargs="+")
    return parser


@command(get_parser, zipfile.BadZipFile)
def main(args: argparse.Namespace) -> None:
    """Unpack all archives."""
    for archive in args.archives:
        count = unzip(archive, args.out_dir)
        logging.info("%s: %d audio files", archive, count)


if __name__ == "__main__":
    main()

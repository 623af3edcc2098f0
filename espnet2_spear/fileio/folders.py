"""Find recordings: audio files below a folder, and those that tables name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from espnet2_spear.fileio.audio import AUDIO_SUFFIXES
from espnet2_spear.fileio.decode import split_ark

SUFFIXES = tuple(AUDIO_SUFFIXES)


def audio_files(folder: Path) -> Iterator[Path]:
    """Yield the audio files below a folder, as :func:`files_below` does."""
    return files_below(folder, _is_audio)


def files_below(folder: Path, wanted: Callable[[str], bool]) -> Iterator[Path]:
    """Yield files below a folder, but none in hidden folders.

    Links are followed. What can be reached in several ways, also by links that lead
    back to a folder above them, is taken once, and where it really is if that is below
    the folder. Real folders come first, sorted one by one, then what links lead to: no
    more than one folder's names are in memory, and a number for each folder and for
    each link to a file.

    Args:
        folder: where to begin.
        wanted: whether a file's name is one of those that are looked for.
    """
    walked: set[tuple[int, int]] = set()
    linked: set[tuple[int, int]] = set()
    later, file_links = [folder], []
    while later:
        links, later = later, []
        for link in links:
            for parent, folders, names in os.walk(link):
                if _is_known(parent, walked):
                    folders.clear()
                    continue
                folders[:] = sorted(n for n in folders if not n.startswith("."))
                later += [Path(parent, n) for n in folders if _is_link(parent, n)]
                for name in sorted(names):
                    if not wanted(name):
                        continue
                    path = Path(parent, name)
                    if path.is_symlink():
                        file_links.append(path)
                    elif path.is_file():
                        yield path
    for path in file_links:
        target = path.resolve()
        is_there = _id(target.parent) in walked and wanted(target.name)
        if target.is_file() and not is_there and not _is_known(target, linked):
            yield path


def _is_audio(name: str) -> bool:
    return name[0] != "." and name.lower().endswith(SUFFIXES)


def _is_link(parent: str, name: str) -> bool:
    return os.path.islink(os.path.join(parent, name))


def _id(path: str | Path) -> tuple[int, int] | None:
    """What a file or folder is, whichever way leads to it; None if it is not there."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _is_known(path: str | Path, seen: set[tuple[int, int]]) -> bool:
    """Whether something was seen before; notes that it is now."""
    number = _id(path)
    known = number is None or number in seen
    if number is not None:
        seen.add(number)
    return known


def find_audio(value: str, folder: Path) -> str:
    """Return the file that a line of ``wav.scp`` names.

    Paths start, as Kaldi's do, where its recipe ran; else beside the table. An entry
    of an ark (``file.ark:offset``) keeps its offset.
    """
    file, offset = split_ark(value)
    beside = folder / file
    found = beside if not file.exists() and beside.exists() else file
    return str(found) if offset is None else f"{found}:{offset}"

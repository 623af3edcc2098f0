"""Kaldi data directories, held in memory."""

from collections.abc import Iterable
from pathlib import Path

from espnet2_spear.fileio.datadir import Entry, entries, write_entries

Utterances = dict[str, Entry]


def read_dir(path: Path, *require: str) -> Utterances:
    """The utterances by id; ``require`` is that of :func:`entries`."""
    return {entry.utt: entry for entry in entries(path, require)}


def write_dir(path: Path, found: Iterable[Entry]) -> None:
    """Write utterances in whatever order they come."""
    write_entries(sorted(found), path)

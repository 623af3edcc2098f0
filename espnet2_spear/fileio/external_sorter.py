"""Sorting more rows than memory holds: sorted runs on disk, merged when read."""

from __future__ import annotations

import heapq
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Generic, TypeVar

Row = TypeVar("Row")
ROWS = 20_000  # kept in memory before they are written as a sorted run
RUNS = 64  # of one size, before they are merged to one
_BLOCK = 100  # rows pickled at a time


def c_order(key: str) -> bytes:
    """Sort key of the C locale: the bytes."""
    return key.encode("utf-8", "surrogateescape")


def by_first(row: Any) -> bytes:
    """Sort key of rows: their first column, as in the C locale."""
    return c_order(row[0])


class ExternalSorter(AbstractContextManager, Generic[Row]):
    """Rows, added in any order and read in that of their first column, again and again.

    At most ROWS of them are in memory, and _BLOCK of each of at most RUNS files a
    level. Equal keys keep the order in which they were added. Use it as a context, or
    close it, to remove its files.

    Args:
        folder: parent of the temporary folder; by default the system's.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._parent = folder
        self._rows: list[Row] = []
        self._levels: list[list[Path]] = []
        self._folder: Path | None = None
        self._files = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, row: Row) -> None:
        """Add a row, of things that pickle knows."""
        self._rows.append(row)
        self._count += 1
        if len(self._rows) >= ROWS:
            self._rows.sort(key=by_first)
            self._keep(self._write(iter(self._rows)), 0)
            self._rows = []

    def __iter__(self) -> Iterator[Row]:
        self._rows.sort(key=by_first)
        # Older runs first, so that the merge keeps the order of equal keys.
        runs = [_read(path) for level in reversed(self._levels) for path in level]
        if not runs:
            return iter(self._rows)
        return heapq.merge(*runs, self._rows, key=by_first)

    def _keep(self, run: Path, number: int) -> None:
        if number == len(self._levels):
            self._levels.append([])
        level = self._levels[number]
        level.append(run)
        if len(level) == RUNS:
            merged = self._write(heapq.merge(*map(_read, level), key=by_first))
            for path in level:
                path.unlink()
            level.clear()
            self._keep(merged, number + 1)

    def _write(self, rows: Iterator[Row]) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(dir=self._parent, prefix=".sorter."))
        path = self._folder / str(self._files)
        self._files += 1
        with path.open("wb") as out:
            block: list[Row] = []
            for row in rows:
                block.append(row)
                if len(block) == _BLOCK:
                    pickle.dump(block, out, pickle.HIGHEST_PROTOCOL)
                    block = []
            pickle.dump(block, out, pickle.HIGHEST_PROTOCOL)
        return path

    def close(self) -> None:
        """Forget all rows and remove the files."""
        self._rows, self._levels, self._count = [], [], 0
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __exit__(self, *unused: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _read(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        while True:
            try:
                block = pickle.load(file)
            except EOFError:
                return
            yield from block

"""Kaldi's tables of ``key value`` lines, read and written line by line."""

from __future__ import annotations

import gzip
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TextIO

from espnet2_spear.errors import UserError
from espnet2_spear.fileio.atomic import TEXT, AtomicFile
from espnet2_spear.fileio.external_sorter import ExternalSorter, c_order


class DataDirError(UserError):
    """A data directory is inconsistent; the message names file, line and remedy."""


def open_table(path: Path) -> IO[bytes]:
    """Open a table.

    Raises:
        DataDirError: it cannot be read.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataDirError(
            f"{path}: cannot be read ({error.strerror}); run the stage that writes it, "
            "or correct what names it"
        ) from error


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a list of another form, that has to be UTF-8; unpacks it if it ends in .gz.

    Args:
        path: of the file.
        newline: as for ``open``.

    Raises:
        DataDirError: it is not UTF-8, which is found as it is read.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline=newline) as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise DataDirError(
                f"{path}: is not UTF-8 (byte {byte:#04x}: {error.reason}); fetch it "
                "again, or convert it (iconv -t UTF-8)"
            ) from None


def rows(
    path: Path, columns: str, empty_values: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield the keys and values of a table; the value is the rest of the line.

    Args:
        path: File to read.
        columns: Names of the columns, for messages.
        empty_values: Whether a line may consist of the key alone.

    Raises:
        DataDirError: missing file, malformed line.
    """
    with open_table(path) as lines:
        for number, raw in enumerate(lines, 1):
            fields = raw.strip().split(maxsplit=1)
            if len(fields) == 1 and empty_values:
                fields.append(b"")
            if len(fields) != 2:
                raise DataDirError(
                    f"{path}, line {number}: expected '{columns}', found "
                    f"{raw.decode(**TEXT).strip()!r}; correct or remove the line"
                )
            yield fields[0].decode(**TEXT), fields[1].decode(**TEXT)


def duplicate_key_error(path: Path, key: str) -> DataDirError:
    """The error of a key that a table has two lines of."""
    return DataDirError(f"{path}: '{key}' appears twice; keep one of its lines")


def is_sorted(path: Path) -> bool:
    """Whether the keys of a table ascend as in the C locale, none of them twice."""
    last = b""
    with open_table(path) as lines:
        for line in lines:
            key = line.split(maxsplit=1)[:1]
            if not key or key[0] <= last:
                return False
            last = key[0]
    return True


def sorted_rows(
    path: Path, columns: str, empty_values: bool = False
) -> Iterator[tuple[str, str]]:
    """As :func:`rows`, in the order of the C locale.

    Raises:
        DataDirError: missing file, malformed line, repeated key.
    """
    if is_sorted(path):
        yield from rows(path, columns, empty_values)
        return
    with ExternalSorter() as table:
        for row in rows(path, columns, empty_values):
            table.add(row)
        last = None
        for row in table:
            if row[0] == last:
                raise duplicate_key_error(path, row[0])
            last = row[0]
            yield row


class Lookup:
    """Values of a table by key, looked up in the file.

    Memory: 9 bytes a line. A table that is not sorted is copied to a temporary file.

    Args:
        path: of the table.
        columns: names of the columns, for messages.

    Attributes:
        used: of each line, in sorted order, whether it was found once (a byte).

    Raises:
        DataDirError: missing file, malformed line, repeated key.
    """

    def __init__(self, path: Path, columns: str) -> None:
        self._file: IO[bytes]
        if is_sorted(path):
            self._file = open_table(path)
        else:
            self._file = tempfile.TemporaryFile()
            for key, value in sorted_rows(path, columns):
                self._file.write(f"{key} {value}\n".encode(**TEXT))
            self._file.seek(0)  # which also writes what is buffered
        self._starts = array("q", [0])
        for number, line in enumerate(self._file, 1):
            if len(line.split(maxsplit=1)) != 2:
                raise DataDirError(
                    f"{path}, line {number}: expected '{columns}', found "
                    f"{line.decode(**TEXT).strip()!r}; correct or remove the line"
                )
            self._starts.append(self._starts[-1] + len(line))
        self.used = bytearray(len(self))
        self._last: tuple[str, int, str] = ("", -1, "")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def row(self, number: int) -> tuple[str, str]:
        """Key and value of a line, in sorted order."""
        start, end = self._starts[number], self._starts[number + 1]
        line = os.pread(self._file.fileno(), end - start, start)
        key, value = line.strip().split(maxsplit=1)
        return key.decode(**TEXT), value.decode(**TEXT)

    def find(self, key: str) -> tuple[int, str] | None:
        """Number of a key's line, and its value; None if there is no such line."""
        if key != self._last[0]:
            number = self._search(key, self._last[1] + 1)
            if number is None:
                return None
            self._last = (key, number, self.row(number)[1])
            self.used[number] = 1
        return self._last[1:]

    def _search(self, key: str, guess: int) -> int | None:
        # Most tables are read in order: the next line is the likeliest.
        if guess < len(self) and self.row(guess)[0] == key:
            return guess
        wanted, low, high = c_order(key), 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if c_order(self.row(middle)[0]) < wanted:
                low = middle + 1
            else:
                high = middle
        return low if low < len(self) and self.row(low)[0] == key else None

    def values(self) -> Iterator[str]:
        """Yield all values, in the order of their keys."""
        return (self.row(number)[1] for number in range(len(self)))

    def unused(self) -> tuple[int, str]:
        """How many keys were never found, and the first of them."""
        count = self.used.count(0)
        return count, self.row(self.used.index(0))[0] if count else ""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TableWriter:
    """Writes a table line by line; it appears when it is finished, or not at all.

    Args:
        path: of the table; its folder is there.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, 0
        self._whole = AtomicFile(path, "w")
        self._file = self._whole.file

    def add(self, key: str, value: object) -> None:
        """Write a line; lines are given in the order they shall have.

        Raises:
            DataDirError: a line break inside, as file names may have it.
        """
        line = f"{key} {value}".rstrip()
        if "\n" in line or "\r" in line:
            raise DataDirError(
                f"{self.path}: {line!r} has a line break in it; rename the file"
            )
        self._file.write(line + "\n")
        self.lines += 1

    def add_words(self, key: str, words: Iterable[str]) -> None:
        """Write a line of many words, which are never in memory at once."""
        self._file.write(key)
        for word in words:
            self._file.write(f" {word}")
        self._file.write("\n")
        self.lines += 1

    def finish(self) -> None:
        """Move the table into place."""
        self._whole.commit()

    def discard(self) -> None:
        """Remove what was written."""
        self._whole.discard()

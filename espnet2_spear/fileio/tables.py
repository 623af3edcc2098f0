"""Kaldi's tables of ``key value`` lines: read, joined, looked up and written.

Whatever their size, only a few lines of them are in memory. Rows are (key, value,
place), where the place is the byte at which the line begins in its file.
"""

from __future__ import annotations

import gzip
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

from espnet2_spear.errors import UserError
from espnet2_spear.fileio.atomic import TEXT, atomic
from espnet2_spear.fileio.external_sorter import ExternalSorter, c_order

Row = tuple[str, str, int]


class DataDirError(UserError):
    """Tables are inconsistent; the message names file, line or key, and remedy."""


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


# --- Reading in the order of lines, or of keys ----------------------------------------


def rows(path: Path, columns: str, empty_values: bool = False) -> Iterator[Row]:
    """Yield the rows of a table; a value is the rest of the line.

    Args:
        path: File to read.
        columns: Names of the columns, for messages.
        empty_values: Whether a line may consist of the key alone.

    Raises:
        DataDirError: missing file, malformed line.
    """
    place = 0
    with open_table(path) as lines:
        for number, raw in enumerate(lines, 1):
            fields = raw.split(maxsplit=1)
            if len(fields) == 1 and empty_values:
                fields.append(b"")
            if len(fields) != 2:
                raise DataDirError(
                    f"{path}, line {number}: expected '{columns}', found "
                    f"{raw.decode(**TEXT).strip()!r}; correct or remove the line"
                )
            key = fields[0].decode("utf-8", "surrogateescape")  # as TEXT, but faster
            yield key, fields[1].rstrip().decode("utf-8", "surrogateescape"), place
            place += len(raw)


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


def sorted_rows(path: Path, columns: str, empty_values: bool = False) -> Iterator[Row]:
    """Yield what :func:`rows` does, in the order of the C locale.

    Raises:
        DataDirError: missing file, malformed line, repeated key.
    """
    if is_sorted(path):
        yield from rows(path, columns, empty_values)
        return
    with ExternalSorter[Row]() as table:
        for row in rows(path, columns, empty_values):
            table.add(row)
        last = None
        for row in table:
            if row[0] == last:
                raise DataDirError(
                    f"{path}: '{last}' appears twice; keep one of its lines"
                )
            last = row[0]
            yield row


def join(*tables: Iterable[Sequence[Any]]) -> Iterator[tuple[str, list[Any]]]:
    """Yield every key of any table, with its row in each (None where it has none).

    Args:
        tables: rows in the order of their first columns, each of which is there once.
    """
    iterators = [iter(table) for table in tables]
    heads: list[Any] = [next(iterator, None) for iterator in iterators]
    while any(heads):
        keys = {head[0] for head in heads if head}
        key = keys.pop() if len(keys) == 1 else min(keys, key=c_order)
        found = [head if head and head[0] == key else None for head in heads]
        heads = [
            next(iterator, None) if row else head
            for iterator, head, row in zip(iterators, heads, found, strict=True)
        ]
        yield key, found


def difference_of(path: Path, key: str, missing: bool) -> DataDirError:
    """Error of a key that a table lacks, or that no other table has."""
    if missing:
        text = "is missing; add what the table lacks, or remove it from the other files"
    else:
        text = "is in no other file; remove such lines, or add them to the other files"
    return DataDirError(f"{path}: utterance '{key}' {text}")


# --- Single lines ---------------------------------------------------------------------


class Lines:
    """A table whose lines are read when they are asked for.

    The file is mapped into memory, which all processes share: nothing is kept of it.

    Args:
        path: of the table.

    Raises:
        DataDirError: here, or of any method: it cannot be read, or was changed since.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = open_table(self.path)
        self.size = os.fstat(self._file.fileno()).st_size
        self._text: mmap.mmap | bytes = b""  # an empty file cannot be mapped
        if self.size:
            self._text = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)

    @classmethod
    def of(cls, table: Iterable[Sequence[object]]) -> Lines:
        """Keep rows, whose first two columns are key and value, in a temporary file."""
        with tempfile.NamedTemporaryFile("w", **TEXT) as file:
            file.writelines(f"{row[0]} {row[1]}\n" for row in table)
            file.flush()
            return cls(file.name)

    @classmethod
    def by_key(cls, path: Path, columns: str) -> Lines:
        """Open a table for :meth:`find`: itself, or a copy in the order of its keys."""
        return cls(path) if is_sorted(path) else cls.of(sorted_rows(path, columns))

    def at(self, place: int) -> tuple[str, str]:
        """Key and value of the line that begins at a byte."""
        self._check()
        key, value, _ = self._line(place)
        return key.decode(**TEXT), value.decode(**TEXT)

    def find(self, key: str) -> str | None:
        """Value of a key, None if it is not there; lines have to be in their order."""
        self._check()
        wanted, low, high = c_order(key), 0, self.size
        while low < high:
            place = max(low, self._text.rfind(b"\n", low, (low + high) // 2) + 1)
            found, value, end = self._line(place)
            if found == wanted:
                return value.decode(**TEXT)
            low, high = (end + 1, high) if found < wanted else (low, place)
        return None

    def _check(self) -> None:
        # Bytes of a file that was cut must not be touched: the process would be killed.
        if os.fstat(self._file.fileno()).st_size != self.size:
            raise DataDirError(
                f"{self.path}: is gone or was changed since it was opened; restore it "
                "and start again (a training with --resume true)"
            )

    def _line(self, place: int) -> tuple[bytes, bytes, int]:
        end = self._text.find(b"\n", place)
        end = self.size if end < 0 else end
        fields = self._text[place:end].strip().split(maxsplit=1)
        if len(fields) != 2:
            line = self._text[place:end].decode(**TEXT)
            raise DataDirError(
                f"{self.path}: expected 'key value', found {line!r}; correct the line"
            )
        return fields[0], fields[1], end


# --- Writing --------------------------------------------------------------------------


class TableWriter:
    """Writes a table line by line, in the order in which the lines are given.

    Args:
        path: of the table, for messages.
        file: what is written to.

    Attributes:
        lines: written so far.
    """

    def __init__(self, path: Path, file: IO[str]) -> None:
        self.path, self.lines, self._file = path, 0, file

    def add(self, key: str, value: object) -> None:
        """Write a line.

        Raises:
            DataDirError: a line break inside, as file names may have it, or white
                space in the key, which would end there when it is read.
        """
        line = f"{key} {value}".rstrip()
        if "\n" in line or "\r" in line:
            raise DataDirError(
                f"{self.path}: {line!r} has a line break in it; rename the file"
            )
        if len(c_order(key).split()) != 1:
            raise DataDirError(
                f"{self.path}: the key {key!r} has white space in it, or is empty; "
                "rename it"
            )
        self._file.write(line + "\n")
        self.lines += 1

    def add_words(self, key: str, words: Iterable[str]) -> None:
        """Write a line of many words, which are never in memory at once."""
        self._file.write(key)
        self._file.writelines(f" {word}" for word in words)
        self._file.write("\n")
        self.lines += 1


@contextmanager
def table_writer(path: Path) -> Iterator[TableWriter]:
    """``with table_writer(path) as table:`` writes a table, whole or not at all."""
    with atomic(path, "w") as file:
        yield TableWriter(path, file)


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Write a table for people: its head and its lines of cells, as Markdown."""
    return "\n".join(
        "| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)
    )

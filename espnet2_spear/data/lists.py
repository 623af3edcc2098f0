"""Kaldi-style lists of millions of lines, looked at as arrays of bytes.

A line is ``key value``. No Python object is made per line: what is wanted of the lines
is gathered in blocks by NumPy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from espnet2_spear.errors import UserError

BLOCK = 1 << 17  # lines
_CHUNK = 1 << 26  # bytes
_NEWLINE, _SPACE, _TAB, _RETURN = 10, 32, 9, 13


class ListError(UserError):
    """A list is missing, malformed, or does not fit to another one."""


class ListFile:
    """Where the lines of a list begin and how long their keys are.

    Args:
        path: the list.

    Attributes:
        starts: int64 (n + 1,), offsets of the lines, and the file's end.
        key_lengths: int32 (n,), in bytes.

    Raises:
        ListError: missing or empty file, an empty line, a line without a value.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            size = self.path.stat().st_size
            self._data = np.memmap(self.path, np.uint8, "r") if size else None
        except OSError as error:
            raise ListError(
                f"{self.path}: cannot be read ({error.strerror}); run the stage that "
                "writes it, or correct the option that names it"
            ) from error
        if self._data is None:
            raise ListError(f"{self.path}: is empty; run the stage that writes it")
        ends = [
            np.flatnonzero(self._data[at : at + _CHUNK] == _NEWLINE) + at + 1
            for at in range(0, size, _CHUNK)
        ]
        self.starts = np.concatenate([[0], *ends]).astype(np.int64)
        if self.starts[-1] != size:  # no newline at the end
            self.starts = np.append(self.starts, size)
        self.key_lengths = np.empty(len(self), np.int32)
        for first, last in blocks(len(self)):
            self.key_lengths[first:last] = self._measure_keys(first, last)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def _measure_keys(self, first: int, last: int) -> np.ndarray:
        data, starts = self._block(first, last)
        places = np.flatnonzero((data == _SPACE) | (data == _TAB))
        # Where a line has none, the next line's is found, or the end.
        places = np.append(places, len(data))
        ends = places[np.searchsorted(places, starts[:-1])]
        # Short of the line's newline and of at least one byte of a value.
        bad = (ends == starts[:-1]) | (ends + 1 >= starts[1:] - 1)
        if last == len(self) and data[-1] != _NEWLINE:
            bad[-1] = ends[-1] == starts[-2] or ends[-1] + 1 >= starts[-1]
        if bad.any():
            number = first + int(np.flatnonzero(bad)[0])
            raise ListError(
                f"{self.path}, line {number + 1}: expected 'utterance value', found "
                f"'{self.line(number)}'; correct or remove the line"
            )
        return ends - starts[:-1]

    def _block(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of some lines, and where each begins among them (and the end)."""
        starts = self.starts[first : last + 1]
        return np.asarray(self._data[starts[0] : starts[-1]]), starts - starts[0]

    def line(self, number: int) -> str:
        """A line, for messages."""
        raw = bytes(self._data[self.starts[number] : self.starts[number + 1]])
        return raw.decode("utf-8", "replace").strip()

    def key(self, number: int) -> str:
        """A line's key."""
        return self.line(number).split(maxsplit=1)[0]

    def keys(self, first: int, last: int, width: int) -> np.ndarray:
        """Keys of some lines as ``S<width>``, cut to that width."""
        data, starts = self._block(first, last)
        return _gather(data, starts[:-1], self.key_lengths[first:last], width)

    def values(self, first: int, last: int, width: int) -> np.ndarray:
        """Values of some lines as ``S<width>``, without white space around them.

        Longer ones are cut to ``width``: ask for one byte more than is wanted.
        """
        data, starts = self._block(first, last)
        begin = starts[:-1] + self.key_lengths[first:last] + 1
        end = starts[1:].copy()
        white = (data == _SPACE) | (data == _TAB) | (data == _RETURN)
        white |= data == _NEWLINE
        while (blank := (begin < end) & white[np.minimum(begin, end - 1)]).any():
            begin += blank
        while (blank := (begin < end) & white[end - 1]).any():
            end -= blank
        return _gather(data, begin, end - begin, width)

    def integers(self) -> np.ndarray:
        """All values, whole numbers of at most nine digits, as int32 (n,).

        Raises:
            ListError: a value is not an integer; the message names the line.
        """
        result = np.empty(len(self), np.int32)
        for first, last in blocks(len(self)):
            digits = self.values(first, last, 10).view(np.uint8).reshape(-1, 10)
            there = digits > 0
            numbers = digits.astype(np.int64) - ord("0")
            bad = (there & ((numbers < 0) | (numbers > 9))).any(axis=1)
            bad |= there[:, 9] | ~there[:, 0]
            if bad.any():
                number = first + int(np.flatnonzero(bad)[0])
                raise ListError(
                    f"{self.path}, line {number + 1}: expected 'utterance samples' "
                    f"with a whole number, found '{self.line(number)}'"
                )
            total = np.zeros(last - first, np.int64)
            for column in range(9):
                total = np.where(
                    there[:, column], total * 10 + numbers[:, column], total
                )
            result[first:last] = total
        return result

    def check_unique(self) -> None:
        """Raise unless every key appears once; fast for sorted lists.

        Raises:
            ListError: a key that appears twice, named.
        """
        width, previous, ascending = int(self.key_lengths.max()), b"", True
        for first, last in blocks(len(self)):
            keys = self.keys(first, last, width)
            ascending = previous < keys[0] and bool((keys[:-1] < keys[1:]).all())
            if not ascending:
                break
            previous = keys[-1]
        if ascending:
            return
        keys = np.sort(self.keys(0, len(self), width))
        twice = keys[1:][keys[1:] == keys[:-1]]
        if len(twice):
            raise ListError(
                f"{self.path}: '{twice[0].decode('utf-8', 'replace')}' appears twice; "
                "keep one of its lines"
            )


def blocks(count: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 of successive blocks of lines."""
    return ((at, min(at + BLOCK, count)) for at in range(0, count, BLOCK))


def lines_of(reference: ListFile, other: ListFile) -> np.ndarray | None:
    """The line of ``other`` that has the key of each line of ``reference``.

    Fast if both are in the same order, as Kaldi's are; ``other`` may have more lines.

    Returns:
        int64 (n,), or None for the lines 0, 1, 2 and so on.

    Raises:
        ListError: keys that ``other`` lacks, counted, one of them named.
    """
    if np.array_equal(reference.key_lengths, other.key_lengths):
        width = int(reference.key_lengths.max())
        if all(
            np.array_equal(reference.keys(*block, width), other.keys(*block, width))
            for block in blocks(len(reference))
        ):
            return None
    width = int(max(reference.key_lengths.max(), other.key_lengths.max()))
    wanted = reference.keys(0, len(reference), width)
    keys = other.keys(0, len(other), width)
    order = np.argsort(keys, kind="stable")
    places = np.minimum(np.searchsorted(keys[order], wanted), len(keys) - 1)
    found = order[places]
    missing = np.flatnonzero(keys[found] != wanted)
    if len(missing):
        raise ListError(
            f"{other.path}: {len(missing)} utterances of {reference.path} are missing, "
            f"e.g. '{reference.key(int(missing[0]))}'; run the stages that write both "
            "with the same data"
        )
    return found.astype(np.int64)


def _gather(
    data: np.ndarray, begin: np.ndarray, lengths: np.ndarray, width: int
) -> np.ndarray:
    """Pieces of ``data`` as ``S<width>``, filled up with zeros."""
    padded = np.concatenate([data, np.zeros(width, np.uint8)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)
    pieces = windows[begin]
    pieces[np.arange(width) >= np.asarray(lengths)[:, None]] = 0
    return pieces.view(f"S{width}").reshape(-1)

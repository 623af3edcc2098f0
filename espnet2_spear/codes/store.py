"""Codes of very many utterances: raw bytes in a few files, an index on disk.

A folder holds

* ``codes.<n>.bin``: rows of N codes, utterance after utterance, of a byte each, or of
  two (little endian) if codebooks have more than 256 entries;
* ``rows.npy`` int64 (U + 1,): first row of every utterance, counted over all files;
* ``names.bin`` and ``names.npy`` int64 (U + 1,): their names and where these begin;
* ``hashes.npy`` uint64 (U,) sorted, ``order.npy`` int64 (U,): the utterance of each;
* ``store.json``: shape, teacher and quantizer; written last.

All of it is memory-mapped. What a process holds itself does not grow with the number
of utterances, and what the system caches is shared by all processes.
"""

from __future__ import annotations

import json
import mmap
import os
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from espnet2_spear.constants import MAX_CODEBOOK_SIZE, MISSING
from espnet2_spear.errors import UserError
from espnet2_spear.fileio.atomic import write_atomically
from espnet2_spear.fileio.hashes import name_hash

INDEX = "store.json"
FORMAT = "espnet2_spear.mvq.CodeStore 1"


class CodeStoreError(UserError):
    """A store of codes is missing, damaged, or does not fit together."""


class CodeStore(Mapping[str, np.ndarray]):
    """Codes by the names of their utterances.

    Can be sent to other processes; each maps the files itself.

    Args:
        folder: as written by :class:`CodeStoreWriter`.

    Attributes:
        facts: what store.json says: ``num_codebooks``, ``codebook_size``,
            ``utterances``, ``rows``, and what the writer was given.

    Raises:
        CodeStoreError: a missing or truncated file, named.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / INDEX
        try:
            self.facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if self.facts["format"] != FORMAT:
                raise ValueError(f"format is {self.facts['format']}, not {FORMAT}")
            count, self.num_codebooks = (
                int(self.facts[key]) for key in ("utterances", "num_codebooks")
            )
            self._dtype = _dtype(int(self.facts.get("codebook_size", 256)))
            starts = [int(row) for row in self.facts["file_starts"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CodeStoreError(
                f"{path}: missing or malformed ({error!r}); write the store again with "
                "espnet2_spear.bin.spear_store_codes"
            ) from error
        self._row_bytes = self.num_codebooks * self._dtype.itemsize
        self._starts = np.array(starts, np.int64)  # first rows of files, and the end
        self._rows = self._index("rows.npy", count + 1)
        self._name_starts = self._index("names.npy", count + 1)
        self._hashes = self._index("hashes.npy", count, np.uint64)
        self._order = self._index("order.npy", count)
        self._names = _map(self.folder / "names.bin", int(self._name_starts[-1]))
        self._files = [
            _map(self.folder / _file(i), int(rows) * self._row_bytes)
            for i, rows in enumerate(np.diff(self._starts))
        ]

    def _index(self, name: str, count: int, dtype: type = np.int64) -> np.ndarray:
        path = self.folder / name
        try:
            values = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CodeStoreError(
                f"{path}: missing or truncated ({error}); write the store again"
            ) from error
        if values.shape != (count,) or values.dtype != dtype:
            raise CodeStoreError(
                f"{path}: holds {values.dtype} {values.shape}, expected {count}; write "
                "the store again"
            )
        return values

    def __reduce__(self) -> tuple[type[CodeStore], tuple[Path]]:
        return type(self), (self.folder,)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[str]:
        return (self.name(number) for number in range(len(self)))

    def __contains__(self, utt: object) -> bool:
        return isinstance(utt, str) and self._find(utt) is not None

    def __getitem__(self, utt: str) -> np.ndarray:
        """All codes of an utterance, int16 (frames, N); a row of -1 if it has none."""
        return self.crop(utt)

    def name(self, number: int) -> str:
        """Name of an utterance by its place in the order of writing."""
        begin, end = self._name_starts[number : number + 2]
        return bytes(self._names[int(begin) : int(end)]).decode()

    def num_frames(self, utt: str) -> int:
        """Frames of an utterance, 0 if it has no codes."""
        number = self._number(utt)
        return int(self._rows[number + 1] - self._rows[number])

    def crop(self, utt: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Frames ``start`` to ``stop`` of an utterance; no other bytes are read.

        Returns:
            int16 (frames, N), as many as there are in that range; a single row of -1
            for an utterance without codes, as in arks of codes.

        Raises:
            KeyError: no such utterance.
            CodeStoreError: a range that begins outside the utterance.
        """
        number = self._number(utt)
        first, end = (int(row) for row in self._rows[number : number + 2])
        if first == end:
            return np.full((1, self.num_codebooks), MISSING, np.int16)
        if not 0 <= start < end - first or (stop is not None and stop <= start):
            raise CodeStoreError(
                f"{self.folder}: frames {start} to {stop} of '{utt}', which has "
                f"{end - first}"
            )
        if stop is not None:
            end = min(end, first + stop)
        first += start
        file = int(np.searchsorted(self._starts, first, side="right")) - 1
        begin = (first - int(self._starts[file])) * self._row_bytes
        size = (end - first) * self.num_codebooks
        codes = np.frombuffer(self._files[file], self._dtype, size, begin)
        return codes.reshape(-1, self.num_codebooks).astype(np.int16)

    def _number(self, utt: str) -> int:
        number = self._find(utt)
        if number is None:
            raise KeyError(utt)
        return number

    def _find(self, utt: str) -> int | None:
        # A plain integer would make NumPy search a copy, converted to float64.
        value = np.uint64(name_hash(utt))
        place = int(np.searchsorted(self._hashes, value))
        while place < len(self._hashes) and self._hashes[place] == value:
            number = int(self._order[place])
            if self.name(number) == utt:
                return number
            place += 1
        return None


class CodeStoreWriter:
    """Writes a store; it is complete, and can be opened, after a clean exit.

    Args:
        folder: made if it is not there.
        num_codebooks: N.
        facts: more for store.json (teacher, quantizer, frame rate). Of a
            ``codebook_size`` of more than 256 a code takes two bytes.
        file_bytes: a file of codes is closed when it has so many.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        num_codebooks: int,
        facts: Mapping[str, Any] | None = None,
        file_bytes: int = 1 << 30,
    ) -> None:
        self.folder, self.num_codebooks = Path(folder), num_codebooks
        self.facts, self.file_bytes = dict(facts or {}), file_bytes
        self.codebook_size = int(self.facts.get("codebook_size", 256))
        self._dtype = _dtype(self.codebook_size)
        self._rows, self._file_starts = array("q", [0]), [0]
        self._name_starts, self._hashes = array("q", [0]), array("Q")

    def __enter__(self) -> CodeStoreWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / INDEX).unlink(missing_ok=True)
        for stale in self.folder.glob("codes.*.bin"):
            stale.unlink()
        self._names = open(self.folder / "names.bin", "wb")
        self._file = open(self.folder / _file(0), "wb")
        return self

    def __len__(self) -> int:
        return len(self._hashes)

    def write(self, utt: str, codes: np.ndarray | None) -> None:
        """Append an utterance; None for one without codes.

        Args:
            utt: its name.
            codes: whole numbers (frames, N) in 0..codebook_size - 1.

        Raises:
            CodeStoreError: another shape, no frames, or other values.
        """
        frames = 0
        if codes is not None:
            codes = np.asarray(codes)
            if (
                codes.ndim != 2
                or codes.shape[1] != self.num_codebooks
                or not len(codes)
            ):
                raise CodeStoreError(
                    f"utterance '{utt}': codes of shape {codes.shape}, expected "
                    f"(frames, {self.num_codebooks}) with at least one frame"
                )
            stored = codes.astype(self._dtype)
            if not np.array_equal(stored, codes) or stored.max() >= self.codebook_size:
                raise CodeStoreError(
                    f"utterance '{utt}': codes in {codes.min()}..{codes.max()} are not "
                    f"whole numbers in 0..{self.codebook_size - 1}"
                )
            if self._file.tell() >= self.file_bytes:
                self._file.close()
                self._file_starts.append(self._rows[-1])
                self._file = open(self.folder / _file(len(self._file_starts) - 1), "wb")
            self._file.write(stored.tobytes())
            frames = len(codes)
        self._rows.append(self._rows[-1] + frames)
        self._hashes.append(name_hash(utt))
        self._names.write(utt.encode())
        self._name_starts.append(self._names.tell())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        self._names.close()
        if kind is not None:
            return
        hashes = np.frombuffer(self._hashes, np.uint64) if self._hashes else []
        hashes = np.asarray(hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")
        self._check_names(hashes, order)
        np.save(self.folder / "rows.npy", np.array(self._rows, np.int64))
        np.save(self.folder / "names.npy", np.array(self._name_starts, np.int64))
        np.save(self.folder / "hashes.npy", hashes[order])
        np.save(self.folder / "order.npy", order.astype(np.int64))
        facts = {
            **self.facts,
            "format": FORMAT,
            "num_codebooks": self.num_codebooks,
            "codebook_size": self.codebook_size,
            "utterances": len(order),
            "rows": self._rows[-1],
            "file_starts": [*self._file_starts, self._rows[-1]],
        }
        text = json.dumps(facts, indent=1) + "\n"
        write_atomically(self.folder / INDEX, text.encode())

    def _check_names(self, hashes: np.ndarray, order: np.ndarray) -> None:
        """Raise if an utterance was written twice."""
        values = hashes[order]
        equal = np.flatnonzero(values[1:] == values[:-1])
        with open(self.folder / "names.bin", "rb") as file:

            def name(number: int) -> str:
                begin, end = self._name_starts[number], self._name_starts[number + 1]
                file.seek(begin)
                return file.read(end - begin).decode()

            for place in equal:
                # Different names of one hash are possible and allowed.
                if name(order[place]) == name(order[place + 1]):
                    raise CodeStoreError(
                        f"{self.folder}: utterance '{name(order[place])}' is written "
                        "twice; give every utterance a name of its own"
                    )


def _dtype(codebook_size: int) -> np.dtype:
    if not 2 <= codebook_size <= MAX_CODEBOOK_SIZE:
        raise CodeStoreError(
            f"codebook_size is {codebook_size}; from 2 to {MAX_CODEBOOK_SIZE}"
        )
    return np.dtype("u1" if codebook_size <= 256 else "<u2")


def _file(number: int) -> str:
    return f"codes.{number}.bin"


def _map(path: Path, size: int) -> mmap.mmap | bytes:
    """Map a file for reading; it must have the size given, in bytes."""
    try:
        found = path.stat().st_size
        if found != size:
            raise CodeStoreError(
                f"{path}: has {found} bytes, expected {size}; it is truncated or of "
                "another store; write the store again"
            )
        if size == 0:
            return b""  # an empty file cannot be mapped
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CodeStoreError(
            f"{path}: cannot be opened ({error}); write the store again"
        ) from error

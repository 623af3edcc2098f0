"""Codes of very many utterances: raw bytes in a few files, and a table of names.

A folder holds

* ``codes.<n>.bin``: rows of N codes, utterance after utterance, of a byte each, or of
  two (little endian) if codebooks have more than 256 entries;
* ``rows``: a table in the order of names, ``utterance first frames``: where its rows
  begin, counted over all files, and how many they are (0: it has no codes);
* ``store.json``: shape, teacher and quantizer; written last.

All of it is memory-mapped. What a process holds itself does not grow with the number
of utterances, and what the system caches is shared by all processes.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from espnet2_spear.constants import MAX_CODEBOOK_SIZE, MISSING
from espnet2_spear.errors import UserError
from espnet2_spear.fileio.atomic import write_atomically
from espnet2_spear.fileio.external_sorter import ExternalSorter
from espnet2_spear.fileio.tables import Lines, rows, table_writer

INDEX = "store.json"
TABLE = "rows"
FORMAT = "espnet2_spear.codes.CodeStore 2"


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
            self.num_codebooks = int(self.facts["num_codebooks"])
            dtype = _dtype(int(self.facts["codebook_size"]))
            self._starts: list[int] = self.facts["file_starts"]
            self._count, table_bytes = (
                self.facts["utterances"],
                self.facts["table_bytes"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CodeStoreError(
                f"{path}: missing or malformed ({error!r}); write the store again with "
                "espnet2_spear.bin.spear_store_codes"
            ) from error
        self._table = Lines(_whole(self.folder / TABLE, table_bytes))
        self._files: list[np.ndarray] = []
        for number, frames in enumerate(np.diff(self._starts).tolist()):
            size = frames * self.num_codebooks * dtype.itemsize
            file = _whole(self.folder / _file(number), size)
            if size:  # an empty file cannot be mapped
                shape = frames, self.num_codebooks
                self._files.append(np.asarray(np.memmap(file, dtype, "r", shape=shape)))

    def __reduce__(self) -> tuple[type[CodeStore], tuple[Path]]:
        return type(self), (self.folder,)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        return (utt for utt, _, _ in rows(self.folder / TABLE, "name first frames"))

    def __contains__(self, utt: object) -> bool:
        return isinstance(utt, str) and self._table.find(utt) is not None

    def __getitem__(self, utt: str) -> np.ndarray:
        """All codes of an utterance, int16 (frames, N); a row of -1 if it has none."""
        return self.crop(utt)

    def num_frames(self, utt: str) -> int:
        """Frames of an utterance, 0 if it has no codes."""
        return self._span(utt)[1]

    def crop(self, utt: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Frames ``start`` to ``stop`` of an utterance; no other bytes are read.

        Returns:
            int16 (frames, N), as many as there are in that range; a single row of -1
            for an utterance without codes, as in arks of codes.

        Raises:
            KeyError: no such utterance.
            CodeStoreError: a range that begins outside the utterance.
        """
        first, frames = self._span(utt)
        if not frames:
            return np.full((1, self.num_codebooks), MISSING, np.int16)
        if not 0 <= start < frames or (stop is not None and stop <= start):
            raise CodeStoreError(
                f"{self.folder}: frames {start} to {stop} of '{utt}', which has "
                f"{frames}"
            )
        stop = frames if stop is None else min(frames, stop)
        file = bisect_right(self._starts, first) - 1
        first -= self._starts[file]
        return self._files[file][first + start : first + stop].astype(np.int16)

    def _span(self, utt: str) -> tuple[int, int]:
        """First row of an utterance, and its number of rows."""
        found = self._table.find(utt)
        if found is None:
            raise KeyError(utt)
        first, frames = found.split()
        return int(first), int(frames)


class CodeStoreWriter(AbstractContextManager):
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
        self._frames, self._starts = 0, [0]

    def __enter__(self) -> CodeStoreWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / INDEX).unlink(missing_ok=True)
        for stale in self.folder.glob("codes.*.bin"):
            stale.unlink()
        self._file = open(self.folder / _file(0), "wb")
        self._spans = ExternalSorter[tuple[str, int, int]](folder=self.folder)
        return self

    def __len__(self) -> int:
        return len(self._spans)

    def write(self, utt: str, codes: np.ndarray | None) -> None:
        """Append an utterance; None for one without codes.

        Args:
            utt: its name, without white space.
            codes: whole numbers (frames, N) in 0..codebook_size - 1.

        Raises:
            CodeStoreError: another shape, no frames, or other values.
        """
        if codes is None:
            self._spans.add((utt, self._frames, 0))
            return
        if codes.ndim != 2 or codes.shape[1] != self.num_codebooks or not len(codes):
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
            self._file = open(self.folder / _file(len(self._starts)), "wb")
            self._starts.append(self._frames)
        self._file.write(stored.tobytes())
        self._spans.add((utt, self._frames, len(codes)))
        self._frames += len(codes)

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        self._file.close()
        with self._spans:
            if kind is None:
                self._finish()

    def _finish(self) -> None:
        with table_writer(self.folder / TABLE) as table:
            before = None
            for utt, first, frames in self._spans:
                if utt == before:
                    raise CodeStoreError(
                        f"{self.folder}: utterance '{utt}' is written twice; give "
                        "every utterance a name of its own"
                    )
                table.add(utt, f"{first} {frames}")
                before = utt
        facts = {
            **self.facts,
            "format": FORMAT,
            "num_codebooks": self.num_codebooks,
            "codebook_size": self.codebook_size,
            "utterances": len(self),
            "rows": self._frames,
            "file_starts": [*self._starts, self._frames],
            "table_bytes": (self.folder / TABLE).stat().st_size,
        }
        text = json.dumps(facts, indent=1) + "\n"
        write_atomically(self.folder / INDEX, text.encode())


def _dtype(codebook_size: int) -> np.dtype:
    if not 2 <= codebook_size <= MAX_CODEBOOK_SIZE:
        raise CodeStoreError(
            f"codebook_size is {codebook_size}; from 2 to {MAX_CODEBOOK_SIZE}"
        )
    return np.dtype("u1" if codebook_size <= 256 else "<u2")


def _file(number: int) -> str:
    return f"codes.{number}.bin"


def _whole(path: Path, size: int) -> Path:
    """Return a file's path; raise CodeStoreError unless it has so many bytes."""
    found = path.stat().st_size if path.exists() else "no"
    if found != size:
        raise CodeStoreError(
            f"{path}: has {found} bytes, expected {size}; it is missing, truncated or "
            "of another store; write the store again"
        )
    return path

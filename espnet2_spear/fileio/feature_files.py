"""Feature matrices on disk, written block by block: Kaldi ark, or one npy an utterance.

A matrix may be larger than memory, so its number of rows is filled in at the end.
"""

from __future__ import annotations

import struct
from abc import abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from espnet2_spear.fileio.atomic import AtomicFile
from espnet2_spear.fileio.names import file_name

_MATRIX = b"\0BFM "  # Kaldi's marks of a binary file and of a float matrix


class FeatureFiles(AbstractContextManager):
    """One matrix after the other, each given as blocks of rows.

    ``begin``, then ``append`` at least once, then ``finish`` or ``abandon``.
    """

    @abstractmethod
    def begin(self, utt: str) -> None:
        """Start the matrix of an utterance."""

    @abstractmethod
    def append(self, block: np.ndarray) -> None:
        """Write rows (n, columns)."""

    @abstractmethod
    def finish(self) -> tuple[str, int]:
        """Return where the matrix is, and its number of rows."""

    @abstractmethod
    def abandon(self) -> None:
        """Take back what was written since ``begin``."""

    @abstractmethod
    def paths(self) -> list[Path]:
        """Return the files written so far."""


class ArkFeatures(FeatureFiles):
    """Float matrices in one ark file, found again by ``file.ark:offset``.

    Args:
        path: of the ark file; the specifiers name it as given here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("wb")

    def __exit__(self, *unused: object) -> None:
        self._file.close()

    def begin(self, utt: str) -> None:
        self._start, self._shape = self._file.tell(), (0, 0)
        self._file.write(f"{utt} ".encode())
        self._offset = self._file.tell()
        self._file.write(self._header())

    def append(self, block: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(block, dtype="<f4").data)
        self._shape = (self._shape[0] + len(block), block.shape[1])

    def finish(self) -> tuple[str, int]:
        end = self._file.tell()
        self._file.seek(self._offset)
        self._file.write(self._header())
        self._file.seek(end)
        return f"{self.path}:{self._offset}", self._shape[0]

    def abandon(self) -> None:
        self._file.seek(self._start)
        self._file.truncate()

    def paths(self) -> list[Path]:
        return [self.path]

    def _header(self) -> bytes:
        rows, columns = self._shape
        return _MATRIX + struct.pack("<bibi", 4, rows, 4, columns)


class NpyFeatures(FeatureFiles):
    """One ``.npy`` (rows, columns) an utterance, there whole or not at all.

    Args:
        folder: gets ``<utterance>.npy``, see :func:`file_name`.
        dtype: as stored.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder, self.dtype = folder, np.dtype(dtype)
        folder.mkdir(parents=True, exist_ok=True)
        self._paths: list[Path] = []
        self._whole: AtomicFile | None = None

    def __exit__(self, *unused: object) -> None:
        if self._whole is not None:
            self._whole.discard()

    def begin(self, utt: str) -> None:
        self._path = self.folder / file_name(utt, ".npy")
        self._shape = (0, 0)
        self._whole = AtomicFile(self._path)
        self._file: BinaryIO = self._whole.file

    def append(self, block: np.ndarray) -> None:
        if self._shape[0] == 0:
            self._write_header(block.shape[1])
        self._file.write(np.ascontiguousarray(block, dtype=self.dtype).data)
        self._shape = (self._shape[0] + len(block), block.shape[1])

    def finish(self) -> tuple[str, int]:
        self._file.seek(0)
        self._write_header(self._shape[1])
        self._whole.commit()
        self._paths.append(self._path)
        return str(self._path), self._shape[0]

    def abandon(self) -> None:
        self._whole.discard()

    def paths(self) -> list[Path]:
        return list(self._paths)

    def _write_header(self, columns: int) -> None:
        # numpy leaves room in the header for the number of rows to grow.
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self._shape[0], columns),
        }
        np.lib.format.write_array_header_1_0(self._file, header)

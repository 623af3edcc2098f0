"""Feature matrices on disk, written block by block: Kaldi ark, or one npy an utterance.

A matrix may be larger than memory, so its number of rows is filled in at the end.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from espnet2_spear.fileio.atomic import TEXT, atomic
from espnet2_spear.fileio.names import file_name, small_folder

_MATRIX = b"\0BFM "  # Kaldi's marks of a binary file and of a float matrix


class Matrix:
    """A matrix that is being written.

    Args:
        file: written to, from where it stands.
        dtype: as stored.
        header: bytes for a shape; as many for any number of rows.
        spec: where the matrix will be found.

    Attributes:
        rows: written so far.
    """

    def __init__(
        self,
        file: BinaryIO,
        dtype: str,
        header: Callable[[int, int], bytes],
        spec: str,
    ) -> None:
        self._file, self._dtype, self._header, self.spec = file, dtype, header, spec
        self._start, self.rows, self._columns = file.tell(), 0, 0

    def append(self, block: np.ndarray) -> None:
        """Write rows (n, columns)."""
        if self._file.tell() == self._start:
            self._columns = block.shape[1]
            self._file.write(self._header(0, self._columns))
        self._file.write(np.ascontiguousarray(block, dtype=self._dtype).data)
        self.rows += len(block)

    def finish(self) -> None:
        """Fill in the number of rows."""
        end = self._file.tell()
        self._file.seek(self._start)
        self._file.write(self._header(self.rows, self._columns))
        self._file.seek(end)


class ArkFeatures(AbstractContextManager):
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

    @contextmanager
    def matrix(self, utt: str) -> Iterator[Matrix]:
        """Write the matrix of an utterance; nothing of it stays after an error."""
        start = self._file.tell()
        try:
            self._file.write(f"{utt} ".encode(**TEXT))
            spec = f"{self.path}:{self._file.tell()}"
            matrix = Matrix(self._file, "<f4", _ark_header, spec)
            yield matrix
            matrix.finish()
        except BaseException:
            self._file.seek(start)
            self._file.truncate()
            raise

    def paths(self) -> list[Path]:
        """Return the files written so far."""
        return [self.path]


def _ark_header(rows: int, columns: int) -> bytes:
    return _MATRIX + struct.pack("<bibi", 4, rows, 4, columns)


class NpyFeatures(AbstractContextManager):
    """One ``.npy`` (rows, columns) an utterance, there whole or not at all.

    Args:
        folder: gets ``<xx>/<utterance>.npy``, see :func:`small_folder` and
            :func:`file_name`.
        dtype: as stored.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder, self.dtype = folder, dtype
        self._paths: list[Path] = []

    def __exit__(self, *unused: object) -> None:
        """Nothing is left to do."""

    @contextmanager
    def matrix(self, utt: str) -> Iterator[Matrix]:
        """Write the matrix of an utterance, whole or not at all."""
        path = self.folder / small_folder(utt) / file_name(utt, ".npy")
        with atomic(path) as file:
            matrix = Matrix(file, self.dtype, self._header, str(path))
            yield matrix
            matrix.finish()
        self._paths.append(path)

    def paths(self) -> list[Path]:
        """Return the files written so far."""
        return list(self._paths)

    def _header(self, rows: int, columns: int) -> bytes:
        # numpy leaves room in the header for the number of rows to grow.
        descr = np.lib.format.dtype_to_descr(np.dtype(self.dtype))
        header = {"descr": descr, "fortran_order": False, "shape": (rows, columns)}
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(buffer, header)
        return buffer.getvalue()


FeatureFiles = ArkFeatures | NpyFeatures

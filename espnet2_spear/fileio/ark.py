"""Codes in Kaldi ark/scp files; the only module that uses omniio.

A matrix of codes (frames, codebooks) of codebooks of up to 256 entries is written as a
Kaldi compressed matrix of one byte an element (compression method 6), which holds
0..255 exactly and which ESPnet's stock ``kaldi_ark`` type reads. Codes of larger
codebooks are written as float32: Kaldi's two-byte forms scale by 1 / 65535, and what
omniio and kaldiio make of them differs from the codes by rounding.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from omniio import kaldi

from espnet2_spear.constants import MISSING
from espnet2_spear.errors import UserError
from espnet2_spear.fileio.atomic import TEXT, write_atomically
from espnet2_spear.fileio.datadir import read_table
from espnet2_spear.fileio.tables import Lines, rows

SCP_COLUMNS = "utterance file:offset"
_UNSIGNED_BYTE = 6  # Kaldi's kOneByteUnsignedInteger


class ArkError(UserError):
    """An ark file is missing, malformed or truncated."""


def read_scp(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read ``utterance file:offset`` lines.

    Returns:
        Utterance -> specifier for :func:`read_matrix`, in the file's order.

    Raises:
        DataDirError: missing file, a line without two columns, a repeated utterance.
    """
    return read_table(Path(path), SCP_COLUMNS)


def read_matrix(spec: str, utt: str | None = None) -> np.ndarray:
    """Read one matrix.

    Args:
        spec: ``file.ark:offset`` as found in an scp file.
        utt: utterance to name in errors.

    Returns:
        float32 (rows, columns).

    Raises:
        ArkError: missing or truncated file, or an offset at which no matrix starts.
    """
    where = f"{spec} (utterance '{utt}')" if utt else spec
    remedy = "write it again (recipe stage 5: tokenization)"
    path, _, offset = spec.rpartition(":")
    if not path or not offset.isdigit():
        raise ArkError(f"{where}: expected 'file.ark:offset'")
    try:
        with open(path, "rb") as ark:
            # Every record is "key \0B<type> <data>": a stale offset shows here,
            # before a reader takes arbitrary bytes for a matrix's size.
            ark.seek(max(int(offset) - 1, 0))
            head = ark.read(3)
    except OSError as error:
        raise ArkError(f"{where}: cannot open the ark file: {error}") from error
    if head != b" \0B":
        problem = "the file ends before" if len(head) < 3 else "no matrix starts at"
        raise ArkError(f"{where}: {problem} this offset; {remedy}")
    try:
        matrix = kaldi.load_mat(spec)
    except Exception as error:  # the readers raise whatever their parser meets
        raise ArkError(
            f"{where}: truncated or corrupt ark file ({error}); {remedy}"
        ) from error
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2:
        raise ArkError(f"{where}: holds no matrix; {remedy}")
    return matrix


class MatricesByName(Mapping[str, np.ndarray]):
    """The matrices of an scp file, of which nothing is in memory.

    Can be sent to other processes; each maps the scp file itself.

    Args:
        scp: its lines in the order of names (C locale), as tokenization writes them.

    Raises:
        DataDirError: it cannot be read.
    """

    def __init__(self, scp: str | os.PathLike[str]) -> None:
        self._lines = Lines(scp)

    def __reduce__(self) -> tuple[type[MatricesByName], tuple[Path]]:
        return type(self), (self._lines.path,)

    def __getitem__(self, utt: str) -> np.ndarray:
        """Matrix of an utterance, float32 (rows, columns); see :func:`read_matrix`."""
        spec = self._lines.find(utt)
        if spec is None:
            raise KeyError(utt)
        return read_matrix(spec, utt)

    def __iter__(self) -> Iterator[str]:
        return (utt for utt, _, _ in rows(self._lines.path, SCP_COLUMNS))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class CodesWriter(AbstractContextManager):
    """Writes an ark file of codes and its scp file.

    The scp file appears, complete, when the context is left, so that an existing scp
    file says that its ark file is complete.

    Args:
        ark: path of the ark file; scp entries name it as it is given here.
        scp: path of the scp file.
        codebook_size: codes are in 0..codebook_size - 1; up to 256 take a byte each.
    """

    def __init__(
        self,
        ark: str | os.PathLike[str],
        scp: str | os.PathLike[str],
        codebook_size: int = 256,
    ) -> None:
        self.ark, self.scp, self.codebook_size = Path(ark), Path(scp), codebook_size
        self._method = _UNSIGNED_BYTE if codebook_size <= 256 else None
        self._lines: dict[str, str] = {}

    def __enter__(self) -> CodesWriter:
        self.ark.parent.mkdir(parents=True, exist_ok=True)
        self.scp.parent.mkdir(parents=True, exist_ok=True)
        self.scp.unlink(missing_ok=True)
        self._file = open(self.ark, "wb")
        return self

    def write(self, utt: str, codes: np.ndarray) -> None:
        """Append one utterance's codes, integers (frames, codebooks).

        Raises:
            ValueError: another shape, no frames, values outside 0..codebook_size - 1,
                or an utterance that was written before.
        """
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.size == 0 or codes.dtype.kind not in "iu":
            raise ValueError(
                f"utterance '{utt}': codes are {codes.dtype} {codes.shape}, expected "
                "integers (frames, codebooks) with at least one frame"
            )
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            raise ValueError(
                f"utterance '{utt}': codes in {codes.min()}..{codes.max()} are not of "
                f"codebooks of {self.codebook_size} entries"
            )
        if utt in self._lines:
            raise ValueError(f"utterance '{utt}' is written twice to {self.ark}")
        self._lines[utt] = _append(
            self._file, self.ark, utt, codes.astype(np.float32), self._method
        )

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        self._file.close()
        if kind is None:
            lines = (f"{utt} {spec}\n" for utt, spec in self._lines.items())
            write_atomically(self.scp, "".join(lines).encode(**TEXT))


def write_missing_codes(ark: str | os.PathLike[str], num_codebooks: int) -> str:
    """Write one row of -1 that stands for the codes of utterances without a teacher.

    Returns:
        The specifier that every such utterance's scp entry holds.
    """
    path = Path(ark)
    path.parent.mkdir(parents=True, exist_ok=True)
    row = np.full((1, num_codebooks), MISSING, np.float32)
    with open(path, "wb") as file:
        return _append(file, path, "missing", row, None)


def _append(
    file: BinaryIO, path: Path, key: str, matrix: np.ndarray, method: int | None
) -> str:
    """Write a matrix; returns its specifier."""
    buffer = io.BytesIO()
    kaldi.save_ark(buffer, {"x": matrix}, compression_method=method)
    # The libraries write no key that is not UTF-8, so x stands for it.
    file.write(key.encode(**TEXT))
    offset = file.tell() + 1
    file.write(buffer.getbuffer()[1:])
    return f"{path}:{offset}"

"""Read the tensors of a CTranslate2 model.bin (format version 6)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from espnet2_spear.teachers.base import TeacherError

_VERSION = 6
# Number of a data type in the file -> numpy type, little endian.
_DTYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}


class _Reader:
    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def bytes(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise EOFError
        return data

    def number(self, code: str) -> int:
        return struct.unpack("<" + code, self.bytes(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.bytes(self.number("H")).decode("utf-8").rstrip("\0")


def read_ctranslate2(
    path: Path, keep: Callable[[str], bool] = lambda name: True
) -> tuple[str, dict[str, Tensor]]:
    """Read a CTranslate2 model file.

    Layout: u32 version, name of the model's kind, u32 revision, u32 count, then per
    tensor its name, u8 rank, u32 sizes, u8 type, u32 bytes, data; little endian,
    strings with a u16 length before them.

    Args:
        path: the ``model.bin``.
        keep: which tensors to read, by name; the others are skipped.

    Returns:
        the kind of the model (``WhisperSpec``) and its tensors in their stored types.

    Raises:
        TeacherError: not such a file, or cut off.
    """
    tensors: dict[str, Tensor] = {}
    with path.open("rb") as file:
        reader = _Reader(file)
        try:
            version = reader.number("I")
            if version != _VERSION:
                raise TeacherError(
                    f"{path}: is not a CTranslate2 model of format {_VERSION} (its "
                    f"first number is {version}); convert it with a current "
                    "ct2-transformers-converter"
                )
            kind = reader.string()
            reader.number("I")
            for _ in range(reader.number("I")):
                name = reader.string()
                shape = [reader.number("I") for _ in range(reader.number("B"))]
                dtype, size = reader.number("B"), reader.number("I")
                data = reader.bytes(size)
                if not keep(name):
                    continue
                if dtype not in _DTYPES:
                    raise TeacherError(
                        f"{path}: tensor {name} has the unknown type {dtype}; convert "
                        "the model with --quantization float16 or float32"
                    )
                array = np.frombuffer(data, _DTYPES[dtype]).reshape(shape)
                tensors[name] = torch.from_numpy(array.copy())
        except (EOFError, UnicodeDecodeError, ValueError) as error:
            if isinstance(error, TeacherError):
                raise
            raise TeacherError(
                f"{path}: is cut off or damaged; fetch it again"
            ) from error
    return kind, tensors

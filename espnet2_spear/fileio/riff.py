"""Whether a WAV file is as long as its header says: libsndfile reads what is there."""

from __future__ import annotations

import os
from pathlib import Path

# Writers that cannot seek back (pipes) leave 0, or about the largest number there is.
_UNKNOWN = 0x7FFF0000


def missing_bytes(path: Path) -> int:
    """Bytes of audio that a WAV file's header promises and that are not there.

    Returns:
        0 for whole files, other formats, and headers that do not tell the length.
    """
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return 0
        size = os.fstat(file.fileno()).st_size
        while len(chunk := file.read(8)) == 8:
            length = int.from_bytes(chunk[4:], "little")
            if chunk[:4] == b"data":
                there = size - file.tell()
                promised = 0 < length < _UNKNOWN
                return max(0, length - there) if promised else 0
            file.seek(length + length % 2, os.SEEK_CUR)
    return 0

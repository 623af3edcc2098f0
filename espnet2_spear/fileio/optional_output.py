"""Output beside the results: if it cannot be written, the run goes on without."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from espnet2_spear.fileio.atomic import TEXT

LONGEST_LINE = 1 << 20  # bytes


@contextmanager
def warn_on_oserror(what: str | Path) -> Iterator[None]:
    """Turn an OSError, such as of a full disk, into a warning that names ``what``."""
    try:
        yield
    except OSError as error:
        logging.warning(f"{what}: cannot be written ({error}); the run goes on without")


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append lines, in place of one that a killed run or a full disk left half.

    Args:
        path: made with its folder if it is not there.
        lines: without their ends.

    Raises:
        OSError: such as of a full disk; then no line is written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(f"{line}\n" for line in lines).encode(**TEXT)
    # Without a buffer, which would be written again when the file is closed.
    with open(path, "ab+", buffering=0) as file:
        start = max(0, file.seek(0, os.SEEK_END) - LONGEST_LINE)
        file.seek(start)
        end = start + len(_whole_lines(file.read()))
        file.truncate(end)
        if file.write(content) < len(content):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def read_lines(path: Path) -> list[str]:
    """Read the whole lines of such a file, without their ends; none if not there.

    Raises:
        OSError: it is there and cannot be read.
    """
    if not path.exists():
        return []
    return _whole_lines(path.read_bytes()).decode(**TEXT).split("\n")[:-1]


def _whole_lines(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]

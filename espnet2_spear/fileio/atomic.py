"""Files that are there whole or not at all: written beside, then renamed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

# Paths and ids need not be valid UTF-8: undecodable bytes survive a round trip.
TEXT = {"encoding": "utf-8", "errors": "surrogateescape"}


@contextmanager
def atomic(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO]:
    """``with atomic(path) as file:`` writes a file that is there whole or not at all.

    It gets its name when the context is left without an error.

    Args:
        path: of the file; its folder is made.
        mode: ``wb`` or ``w``: UTF-8 in which other bytes survive, as in names of files.

    Raises:
        OSError: such as a full disk; names the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with open(handle, mode, **(TEXT if mode == "w" else {})) as file:
            yield file
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException as error:
        Path(part).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a whole content; see :func:`atomic`."""
    with atomic(path) as file:
        file.write(content)


def write_json(path: str | os.PathLike[str], facts: Any) -> None:
    """Write facts as JSON; see :func:`atomic`."""
    write_atomically(path, (json.dumps(facts, indent=1) + "\n").encode())

"""Files that are there whole or not at all: written beside, then renamed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO

# Paths and ids need not be valid UTF-8: undecodable bytes survive a round trip.
TEXT = {"encoding": "utf-8", "errors": "surrogateescape"}


class AtomicFile:
    """A file that appears under its name when it is complete.

    As a context it gives the open file, and is complete when the context is left
    without an error.

    Args:
        path: of the file; its folder is made.
        mode: ``wb`` or ``w``: UTF-8 in which other bytes survive, as in names of files.

    Attributes:
        file: what is written to.

    Raises:
        OSError: such as a full disk; names the file.
    """

    def __init__(self, path: str | os.PathLike[str], mode: str = "wb") -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(
            dir=self.path.parent, prefix=".", suffix=".part"
        )
        self._temporary = Path(temporary)
        self.file: IO = open(handle, mode, **(TEXT if mode == "w" else {}))

    def commit(self) -> None:
        """Give the file its name."""
        try:
            self.file.close()
            os.chmod(self._temporary, 0o644)
            os.replace(self._temporary, self.path)
        except OSError as error:
            self.discard()
            raise self._named(error) from error

    def discard(self) -> None:
        """Remove what was written, unless it has its name already."""
        try:
            self.file.close()
        except OSError:  # the disk is full, and this was the last block
            pass
        self._temporary.unlink(missing_ok=True)

    def _named(self, error: OSError) -> OSError:
        if error.filename is not None:
            return error
        return OSError(error.errno, error.strerror, str(self.path))

    def __enter__(self) -> IO:
        return self.file

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.commit()
            return
        self.discard()
        if isinstance(value, OSError) and value.filename is None:
            raise self._named(value) from value


def atomic(path: str | os.PathLike[str], mode: str = "wb") -> AtomicFile:
    """``with atomic(path) as file:`` writes a file that is there whole or not at all.

    Args:
        path: of the file; its folder is made.
        mode: ``wb`` or ``w``.
    """
    return AtomicFile(path, mode)


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a whole content; see :func:`atomic`."""
    with atomic(path) as file:
        file.write(content)

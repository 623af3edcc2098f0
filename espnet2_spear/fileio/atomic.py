"""Files that are there whole or not at all: written beside, then renamed."""

from __future__ import annotations

import json
import os
import shutil
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


@contextmanager
def atomic_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """``with atomic_files(folder) as work:`` writes files that appear if all succeed.

    For writers that want a path, or that write several files: what they leave in
    ``work`` is moved into the folder, one by one, when the context is left without an
    error. So each is whole, and an error while they are written leaves none.

    Args:
        folder: made if it is not there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=folder) as work:
        yield Path(work)
        for file in sorted(Path(work).iterdir()):
            os.replace(file, folder / file.name)


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a whole content; see :func:`atomic`."""
    with atomic(path) as file:
        file.write(content)


def write_json(path: str | os.PathLike[str], facts: Any) -> None:
    """Write facts as JSON; see :func:`atomic`."""
    write_atomically(path, (json.dumps(facts, indent=1) + "\n").encode())


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; what was there before still is."""


def save_whole(
    content: Any, path: str | os.PathLike[str], keep_as: Path | None = None
) -> None:
    """Write a file by torch.save that replaces the old one when it is on the disk.

    Args:
        content: for torch.save.
        path: of the file.
        keep_as: name that the old file gets.

    Raises:
        CheckpointWriteError: the disk is full, or the folder is not writable.
    """
    import torch  # which those who read tables need not wait for

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic(path) as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
            if keep_as is not None and path.exists():
                os.replace(path, keep_as)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # lets the new name survive a power failure
        os.close(folder)
    # torch's writer turns errors of the file into RuntimeErrors.
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(path.parent).free / 2**20
        raise CheckpointWriteError(
            f"{path}: cannot be written ({error}); {free:.0f} MiB are free on that "
            "disk. The previous file is as it was: make room and start again (a "
            "training with --resume true)"
        ) from error


def point_link(path: Path, target: str) -> None:
    """Point a symbolic link somewhere else without a moment in which it is absent."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, path)

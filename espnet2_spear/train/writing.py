"""Files of tensors that are whole under their name, or not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from espnet2_spear.fileio.atomic import atomic


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written; what was there before still is."""


def save_whole(content: Any, path: Path, keep_as: Path | None = None) -> None:
    """Write a file by torch.save that replaces the old one when it is on the disk.

    Args:
        content: for torch.save.
        path: of the file.
        keep_as: name that the old file gets.

    Raises:
        CheckpointWriteError: the disk is full, or the folder is not writable.
    """
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
            "disk. The previous file is as it was: make room and start again with "
            "--resume true"
        ) from error


def point_link(path: Path, target: str) -> None:
    """Point a symbolic link somewhere else without a moment in which it is absent."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, path)

"""Checkpoints that are whole or not there, and the last good one of them."""

from __future__ import annotations

import datetime
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

CHECKPOINT = "checkpoint.pth"
PREVIOUS = "checkpoint.prev.pth"
_PARTS = ("model", "reporter", "optimizers", "schedulers")
# What reporters of ESPnet 202511 put into checkpoints; none of it runs code.
_SCALARS = [
    np.dtype,
    np._core.multiarray.scalar,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
    type(np.dtype(np.int64)),
    datetime.timedelta,
]


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written; what was there before still is."""


class ResumeError(RuntimeError):
    """No checkpoint of an experiment can be read."""


def atomic_save(
    content: Any,
    path: Path,
    keep_as: Path | None = None,
    save: Callable[[Any, Any], None] | None = None,
) -> None:
    """Write a file that is complete under its name, or leave the old one.

    Args:
        content: for torch.save.
        path: replaced at once when all bytes are on the disk.
        keep_as: name that the file so far gets, where the file system has hard links.
        save: writes the content to an open file; torch.save by default.

    Raises:
        CheckpointWriteError: the disk is full, or the folder is not writable.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            (save or torch.save)(content, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            _link(path, keep_as)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    # torch's writer turns errors of the file into RuntimeErrors.
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 2**20
        raise CheckpointWriteError(
            f"{path}: cannot be written ({error}); {free:.0f} MiB are free on that "
            "disk. The previous file is as it was: make room and start again with "
            "--resume true"
        ) from error


def _link(path: Path, name: Path) -> None:
    """Give a file a second name, replacing what had it."""
    temporary = name.with_name(name.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
        os.replace(temporary, name)
    except OSError as error:
        logging.warning(f"{name}: not kept as a second checkpoint ({error})")


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_symlink(target: str, path: Path) -> None:
    """Point a symbolic link somewhere else without a moment in which it is absent."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, path)


@contextmanager
def atomic_saves(complete: Callable[[Path, Any], Any]) -> Iterator[None]:
    """Let every torch.save to a path be atomic, those inside ESPnet's loop too.

    Args:
        complete: gets the path and the content, returns what is written.
    """
    plain = torch.save

    def save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(f, (str, os.PathLike)):
            return plain(obj, f, *args, **kwargs)
        path = Path(f)
        keep_as = path.with_name(PREVIOUS) if path.name == CHECKPOINT else None
        atomic_save(complete(path, obj), path, keep_as, plain)

    torch.save = save
    try:
        yield
    finally:
        torch.save = plain


def primitive(value: Any) -> Any:
    """Replace NumPy scalars and time spans by what ``weights_only`` loading accepts."""
    if isinstance(value, Mapping):
        return {k: primitive(v) for k, v in value.items()}
    if isinstance(value, datetime.timedelta):
        return {"__timedelta_seconds__": value.total_seconds()}
    if isinstance(value, np.generic):
        return value.item()
    return value


def from_primitive(value: Any) -> Any:
    """Undo :func:`primitive`; NumPy scalars stay Python's."""
    if isinstance(value, Mapping):
        if set(value) == {"__timedelta_seconds__"}:
            return datetime.timedelta(seconds=value["__timedelta_seconds__"])
        return {k: from_primitive(v) for k, v in value.items()}
    return value


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read one file to the CPU, without executing anything that it holds.

    Raises:
        ResumeError: not there, damaged, or something else than a checkpoint.
    """
    try:
        with torch.serialization.safe_globals(_SCALARS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever damaged bytes make of the reader
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ResumeError(f"{path}: cannot be read ({reason[0]})") from error
    missing = [k for k in _PARTS if not isinstance(content, dict) or k not in content]
    if missing:
        raise ResumeError(f"{path}: no checkpoint of a training, lacks {missing}")
    return content


def read_last_good(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Read the newest checkpoint of an experiment that is whole.

    Raises:
        ResumeError: none is; the message says what is wrong with each.
    """
    problems = []
    for name in (CHECKPOINT, PREVIOUS):
        try:
            content = read_checkpoint(folder / name)
        except ResumeError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            logging.warning(f"{problem}: the previous checkpoint is used instead")
        return folder / name, content
    raise ResumeError(
        "; ".join(problems) + ". Restore one of them, or start anew into another "
        "--output_dir (--init_param takes the last Nepoch.pth)"
    )


def repair_epoch_files(
    folder: Path, epoch: int, model: Mapping[str, torch.Tensor], best: list[str]
) -> None:
    """Write what an epoch's end was about to write when the process died.

    ESPnet writes checkpoint.pth, then Nepoch.pth, then the links; a run that resumes
    from the first never comes back to the others.

    Args:
        folder: the experiment.
        epoch: the last complete epoch.
        model: its tensors.
        best: criteria (``valid.loss``) of which this epoch is the best.
    """
    file = folder / f"{epoch}epoch.pth"
    if not file.exists():
        logging.warning(f"{file}: was not written before the interruption; written now")
        atomic_save(dict(model), file)
    for name in ["latest.pth", *(f"{criterion}.best.pth" for criterion in best)]:
        link = folder / name
        if not link.is_symlink() or os.readlink(link) != file.name:
            atomic_symlink(file.name, link)

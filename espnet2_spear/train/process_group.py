"""The life of torch.distributed's process group."""

from __future__ import annotations

import contextlib
import gc
import importlib
import traceback
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def process_group_that_ends() -> Iterator[None]:
    """Within it, a process group may be made; it ends with the block.

    Gloo's threads take Python's lock to let go of the tensors of a collective. If the
    process ends meanwhile, they abort it (exit status -6), although all is done; if
    the group goes with its last user, which is DistributedDataParallel, it waits for
    these threads while it holds the lock that they wait for, for ever. So its users go
    first, those in the locals of a finished training too, and then the group.
    Whoever leaves by an error leaves the group as it is: its end could wait for ranks
    that no longer answer.
    """
    # Its functions keep the group of the moment of its import, as default arguments.
    # Imported later (optimizers do it), they would hold the group beyond its end.
    importlib.import_module("torch.distributed.nn")
    try:
        yield
    except SystemExit as error:
        traceback.clear_frames(error.__traceback__)
        _end()
        raise
    _end()


def _end() -> None:
    if torch.distributed.is_initialized():
        gc.collect()  # users that refer to themselves
        torch.distributed.destroy_process_group()

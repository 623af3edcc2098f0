"""The life of torch.distributed's process group."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def process_group_that_ends() -> Iterator[None]:
    """Within it, a process group may be made; it ends with the block.

    Gloo's threads let go of the tensors of the last collective when Python runs them.
    If the process ends meanwhile, they abort it (exit status -6), although all is done.
    Whoever leaves by an error leaves the group as it is: its end could wait for ranks
    that no longer answer.
    """
    # Its functions keep the group of the moment of its import, as default arguments.
    # Imported later (optimizers do it), they would hold the group beyond its end.
    importlib.import_module("torch.distributed.nn")
    try:
        yield
    except SystemExit:
        _end()
        raise
    _end()


def _end() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

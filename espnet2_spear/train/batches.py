"""Iterate over an epoch: resumable, ranks in lockstep, seeded per step."""

from __future__ import annotations

import inspect
import random
import time
from collections.abc import Callable, Generator, Iterator, Sized
from dataclasses import dataclass

import numpy as np
import torch
from espnet2.iterators.abs_iter_factory import AbsIterFactory
from torch.utils.data import DataLoader

from espnet2_spear.fileio.hashes import name_hash
from espnet2_spear.train.interruption import survive_signals


def seed_all(*what: int | str) -> None:
    """Seed Python, NumPy and torch (all devices) from a tuple.

    Random numbers of a step then depend on which step it is, and not on what ran
    before it in the same process.
    """
    seed = name_hash(repr(what)) >> 1
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def open_epoch(
    factory: AbsIterFactory, epoch: int, start: int = 0
) -> tuple[Iterator, int | None, Sized]:
    """Begin an epoch, with its ``start``-th batch.

    Args:
        factory: ESPnet's or this package's. If its ``build_iter`` has an argument
            ``start``, it gets the number of batches to skip; those of others are read.
        epoch: from 1.
        start: batches that are done.

    Returns:
        the batches; how many the whole epoch has (None: nobody says); and the
        utterances that could not be read so far.
    """
    collate = getattr(factory, "collate_fn", None)
    if hasattr(collate, "set_epoch"):  # before workers start: it draws the noise
        collate.set_epoch(epoch)
    skips = "start" in inspect.signature(factory.build_iter).parameters
    loader = factory.build_iter(epoch, **({"start": start} if skips else {}))
    if isinstance(loader, DataLoader):
        loader.worker_init_fn = survive_signals(loader.worker_init_fn)
    try:
        total = len(loader) + (start if skips else 0)
    except TypeError:
        total = None
    batches = iter(loader)
    for _ in range(0 if skips else start):
        next(batches, None)
    return batches, total, getattr(loader, "skips", ())


@dataclass
class Window:
    """Batches of one optimizer step.

    Attributes:
        batches: (utterance ids, tensors) each.
        load_seconds: time that each took to come.
    """

    batches: list[tuple[list[str], dict[str, torch.Tensor]]]
    load_seconds: list[float]


def windows(
    batches: Iterator,
    size: int,
    position: int,
    seed: tuple[int | str, ...],
    agree: Callable[[int], int],
) -> Generator[Window, None, None]:
    """Group batches by optimizer step; ends their loader when it is closed.

    Args:
        batches: of this rank.
        size: batches of a step; the last one may have fewer.
        position: batches of the epoch that are done already.
        seed: with the position it seeds what loads a batch in this process.
        agree: takes how many batches this rank has for a step, and returns how many
            all ranks have.
    """
    try:
        while True:
            window = Window([], [])
            while len(window.batches) < size:
                seed_all("load", *seed, position)
                start = time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    break
                window.load_seconds.append(time.perf_counter() - start)
                window.batches.append(batch)
                position += 1
            count = agree(len(window.batches))
            if count == 0:
                return
            yield Window(window.batches[:count], window.load_seconds[:count])
    finally:
        # The workers of an abandoned loader, which wait for nobody else.
        for name in ("close", "_shutdown_workers"):
            getattr(batches, name, lambda: None)()

"""Iterate over an epoch: resumable, ranks in lockstep, seeded per step."""

from __future__ import annotations

import inspect
import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from espnet2.iterators.abs_iter_factory import AbsIterFactory
from torch.utils.data import DataLoader

from espnet2_spear.fileio.hashes import name_hash
from espnet2_spear.train.interruption import PatientWorker


def seed_all(*what: int | str) -> None:
    """Seed Python, NumPy and torch (all devices) from a tuple.

    Random numbers of a step then depend on which step it is, and not on what ran
    before it in the same process.
    """
    seed = name_hash(repr(what)) >> 1
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def open_epoch(factory: AbsIterFactory, epoch: int, start: int = 0) -> Iterable:
    """Batches of an epoch from its ``start``-th on.

    Args:
        factory: ESPnet's or this package's. If its ``build_iter`` has an argument
            ``start``, it gets the number of batches to skip; batches of a torch
            DataLoader are skipped unread, those of anything else are read.
        epoch: from 1.
        start: batches that are done.
    """
    if "start" in inspect.signature(factory.build_iter).parameters:
        iterator = factory.build_iter(epoch, start=start)
    else:
        iterator = skip_batches(factory.build_iter(epoch), start)
    if isinstance(iterator, DataLoader):
        iterator.worker_init_fn = PatientWorker(iterator.worker_init_fn)
    return iterator


def skip_batches(iterator: Iterable, start: int) -> Iterable:
    """Leave out the first batches."""
    if start == 0:
        return iterator
    if isinstance(iterator, DataLoader) and isinstance(iterator.batch_sampler, list):
        return DataLoader(
            dataset=iterator.dataset,
            batch_sampler=iterator.batch_sampler[start:],
            num_workers=iterator.num_workers,
            collate_fn=iterator.collate_fn,
            pin_memory=iterator.pin_memory,
            worker_init_fn=iterator.worker_init_fn,
        )
    return itertools.islice(iterator, start, None)


@dataclass
class Window:
    """Batches of one optimizer step.

    Attributes:
        batches: (utterance ids, tensors) each.
        load_seconds: time that each took to come.
        stop: whether any rank was asked to stop.
    """

    batches: list[tuple[list[str], dict[str, torch.Tensor]]]
    load_seconds: list[float]
    stop: bool


def windows(
    iterator: Iterable,
    size: int,
    position: int,
    seed: tuple[int | str, ...],
    stop_requested: Callable[[], bool],
    device: torch.device | None = None,
) -> Iterator[Window]:
    """Group batches by optimizer step; ranks get equally many, and end together.

    Args:
        iterator: batches of this rank.
        size: batches of a step; the last one may have fewer.
        position: batches of the epoch that are done already.
        seed: with the position it seeds what loads a batch in this process.
        stop_requested: whether this rank was asked to stop.
        device: for the exchange between ranks; None for a single rank.

    Yields:
        windows of at least one batch; one without batches if it is to stop.
    """
    batches = iter(iterator)
    try:
        while True:
            window = Window([], [], False)
            while len(window.batches) < size and not stop_requested():
                seed_all("load", *seed, position)
                start = time.perf_counter()
                try:
                    batch = next(batches)
                except StopIteration:
                    break
                window.load_seconds.append(time.perf_counter() - start)
                window.batches.append(batch)
                position += 1
            window.stop = stop_requested()
            count = len(window.batches)
            if device is not None:
                shared = torch.tensor([count, -int(window.stop)], device=device)
                torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MIN)
                count, stop = shared.tolist()
                window.stop = stop < 0
            if window.stop:
                # Not even begun: they come again when the training is resumed.
                yield Window([], [], True)
                return
            if count == 0:
                return
            yield Window(window.batches[:count], window.load_seconds[:count], False)
    finally:
        # The workers of an abandoned loader, which wait for nobody else.
        for name in ("close", "_shutdown_workers"):
            getattr(batches, name, lambda: None)()


def count_audio(batch: dict[str, Any]) -> tuple[float, float, int]:
    """Samples without padding, samples with it, and utterances of a batch (CPU)."""
    lengths = batch["speech_lengths"]
    return float(lengths.sum()), float(batch["speech"].numel()), len(lengths)

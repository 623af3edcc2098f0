"""Mini-batches of one rank, epoch by epoch, from any batch of an epoch on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import numpy as np
from espnet2.iterators.abs_iter_factory import AbsIterFactory
from torch import Tensor
from torch.utils.data import DataLoader

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.data.dataset import ManifestDataset
from espnet2_spear.data.sampler import StepSampler
from espnet2_spear.data.skipping import SkipLog, collate_loaded

Batch = tuple[list[str], dict[str, Tensor]]


class StepBatches:
    """The part of every step that a rank reads, in ``accum_grad`` batches.

    With W ranks and ``accum_grad`` A, a step of S shards is cut into A * W parts of
    S / (A * W) shards each: batch a of rank r is part a * W + r. What a step consists
    of does therefore not depend on W and A.

    Args:
        sampler: the steps.
        num_iters: batches of a (virtual) epoch, a multiple of ``accum_grad``.
        accum_grad: batches of a step.
        world_size: ranks.
        rank: this one.

    Raises:
        ValueError: numbers that do not divide each other.
    """

    def __init__(
        self,
        sampler: StepSampler,
        num_iters: int,
        accum_grad: int = 1,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        check_parts(sampler.shards, num_iters, accum_grad, world_size)
        self.sampler, self.num_iters = sampler, num_iters
        self.accum_grad, self.world_size, self.rank = accum_grad, world_size, rank

    def __len__(self) -> int:
        return self.num_iters

    def rows(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """Rows of the batches of an epoch (from 1), from number ``start`` (from 0)."""
        first = (epoch - 1) * self.num_iters + start
        step, part = divmod(first, self.accum_grad)
        parts = self.accum_grad * self.world_size

        def endless(part: int) -> Iterator[np.ndarray]:
            for rows in self.sampler.steps(step):
                size = len(rows) // parts
                for number in range(part, self.accum_grad):
                    at = (number * self.world_size + self.rank) * size
                    yield rows[at : at + size]
                part = 0

        return islice(endless(part), self.num_iters - start)


def check_parts(
    shards: int, num_iters: int, accum_grad: int, world_size: int = 1
) -> None:
    """See that steps and epochs can be cut into the batches of all ranks.

    Raises:
        ValueError: numbers that do not divide each other.
    """
    if shards % (world_size * accum_grad):
        raise ValueError(
            f"sampler_conf.step_shards={shards} is no multiple of {world_size} GPUs "
            f"times accum_grad={accum_grad}; choose one that is (other steps follow "
            "from it), or other numbers of those"
        )
    if num_iters % accum_grad:
        raise ValueError(
            f"num_iters_per_epoch={num_iters} is no multiple of "
            f"accum_grad={accum_grad}; an epoch would end within a step"
        )


class FixedBatches:
    """The same batches in every epoch, as lists of rows."""

    def __init__(self, batches: Sequence[Sequence[int]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def rows(self, epoch: int, start: int = 0) -> Iterator[Sequence[int]]:
        """Rows of the batches, from number ``start`` on."""
        return iter(self.batches[start:])


RowBatches = StepBatches | FixedBatches  # rows of the batches of one rank


class SpearIterFactory(AbsIterFactory):
    """Builds the iterator of an epoch; see docs/pretraining.md, "Sampling".

    Args:
        dataset: reads the rows of a batch.
        batches: the rows.
        collate_fn: ESPnet's interface.
        skips: counts and lists what cannot be read.
        name: of the data, for the log.
        bound: samples of a batch, with padding, at most (for reports only).
        num_workers: processes that read; 0 reads in this one.
        pin_memory: for copies to a GPU.
    """

    def __init__(
        self,
        dataset: ManifestDataset,
        batches: RowBatches,
        collate_fn: Callable,
        skips: SkipLog,
        name: str = "train",
        bound: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.dataset, self.batches, self.collate_fn = dataset, batches, collate_fn
        self.skips, self.name, self.bound = skips, name, bound
        self.num_workers, self.pin_memory = num_workers, pin_memory

    def build_iter(
        self, epoch: int, shuffle: bool | None = None, start: int = 0
    ) -> EpochIterator:
        """Iterate over the batches of an epoch, once.

        Args:
            epoch: its number, from 1.
            shuffle: part of ESPnet's interface, without effect.
            start: batch to begin with, from 0. Earlier ones are not read.

        Raises:
            ValueError: a ``start`` outside the epoch.
        """
        if not 0 <= start <= len(self.batches):
            raise ValueError(f"batch {start} of an epoch of {len(self.batches)}")
        return EpochIterator(self, epoch, start)


class EpochIterator(DataLoader):
    """Batches of an epoch, as ESPnet's trainer wants them.

    Args:
        factory: whose data are read.
        epoch: its number, from 1.
        start: batch to begin with, from 0.

    Attributes:
        skips: counts and lists what cannot be read.
    """

    def __init__(self, factory: SpearIterFactory, epoch: int, start: int) -> None:
        self.factory, self.skips = factory, factory.skips
        self.left = len(factory.batches) - start
        super().__init__(
            factory.dataset,
            batch_sampler=factory.batches.rows(epoch, start),
            collate_fn=partial(collate_loaded, factory.collate_fn),
            num_workers=factory.num_workers,
            pin_memory=factory.pin_memory,
        )

    def __len__(self) -> int:
        return self.left

    def __iter__(self) -> Iterator[Batch]:
        batches = utterances = samples = padded = 0
        for utts, batch, loaded in super().__iter__():
            self.skips.add(loaded)
            batches += 1
            utterances += len(utts)
            samples += int(batch["speech_lengths"].sum())
            padded += batch["speech"].numel()
            yield utts, batch
        fill = skips = ""
        if self.factory.bound is not None:
            share = padded / (max(batches, 1) * self.factory.bound)
            fill = f", {share:.1%} of the bound"
        if len(self.skips):
            skips = f"; skipped so far: {self.skips.summary()}"
        logging.info(
            f"[{self.factory.name}] {batches} batches, {utterances} utterances, "
            f"{samples / SAMPLE_RATE / 3600:.2f} h; padding "
            f"{1 - samples / max(padded, 1):.1%}{fill}{skips}"
        )

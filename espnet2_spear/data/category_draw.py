"""Epochs of clips in which classes are drawn by weight, for corpora of any size.

ESPnet's sampler ``catpow`` draws as many clips as the corpus has, one by one and before
every epoch, though an epoch of ``num_iters_per_epoch`` batches uses a part of them: of
the two million clips of AudioSet a tenth. Here no more is drawn, and by numpy.

P(class) = (n_class / sum of n)^factor, normalised; n are the samples of a class. Within
a class clips come in a random order, each once before any comes again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from espnet2.iterators.abs_iter_factory import AbsIterFactory
from torch.utils.data import DataLoader, Dataset

from espnet2_spear.fileio.datadir import read_table
from espnet2_spear.fileio.tables import DataDirError


class CategoryDraw:
    """Batches of clips, drawn by class.

    Args:
        category2utt: table of a class and its clips.
        sizes: clip -> samples.
        factor: 0 draws all classes equally often, 1 in proportion to their samples.
        batch_bins: a batch ends with the clip that makes it longer, in samples.
        min_batch_size: clips of a batch, at least.
        max_batch_size: clips of a batch, at most; None: any number.
        seed: of all epochs, not negative.

    Raises:
        DataDirError: no classes, or a clip of unknown length.
    """

    def __init__(
        self,
        category2utt: str | Path,
        sizes: Mapping[str, int],
        factor: float,
        batch_bins: int,
        min_batch_size: int = 1,
        max_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        table = read_table(Path(category2utt), "class and its clips")
        if not table:
            raise DataDirError(f"{category2utt}: no classes; write it again (stage 2)")
        self._utts = list(sizes)
        places = {utt: place for place, utt in enumerate(self._utts)}
        self._sizes = np.fromiter(sizes.values(), np.int64, len(sizes))
        try:
            self._classes = [
                np.array([places[utt] for utt in clips.split()], np.int64)
                for clips in table.values()
            ]
        except KeyError as error:
            raise DataDirError(
                f"{category2utt}: the length of {error} is not known; write the list "
                "and utt2num_samples from the same data (stage 2)"
            ) from None
        samples = np.array([self._sizes[clips].sum() for clips in self._classes])
        weights = (samples / samples.sum()) ** factor
        self._shares = weights / weights.sum()
        self._bins, self.seed = batch_bins, seed
        self._least, self._most = min_batch_size, max_batch_size

    def batches(self, epoch: int, count: int) -> list[list[str]]:
        """Return ``count`` batches of clips: the same for the same epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        # Of each class an endless sequence, of which so many clips were taken.
        orders = [np.zeros(0, np.int64) for _ in self._classes]
        taken = np.zeros(len(orders), np.int64)
        mean = self._shares @ [self._sizes[clips].mean() for clips in self._classes]
        batches: list[list[str]] = []
        batch, bins = [], 0
        while True:
            left = count - len(batches)
            drawn = self._clips(
                rng, max(100, int(left * self._bins / mean)), orders, taken
            )
            for place, size in zip(drawn, self._sizes[drawn], strict=True):
                batch.append(self._utts[place])
                bins += size
                full = bins > self._bins and len(batch) >= self._least
                if full or len(batch) == self._most:
                    batches.append(batch)
                    batch, bins = [], 0
                    if len(batches) == count:
                        return batches

    def _clips(
        self,
        rng: np.random.Generator,
        count: int,
        orders: list[np.ndarray],
        taken: np.ndarray,
    ) -> np.ndarray:
        """Draw the places of some clips; carries the orders of the classes on."""
        classes = rng.choice(len(orders), count, p=self._shares)
        result = np.empty(count, np.int64)
        by_class = np.argsort(classes, kind="stable")
        ends = np.cumsum(np.bincount(classes, minlength=len(orders)))
        for number, where in enumerate(np.split(by_class, ends[:-1])):
            first, last = taken[number], taken[number] + len(where)
            while len(orders[number]) < last:
                again = rng.permutation(self._classes[number])
                orders[number] = np.concatenate([orders[number], again])
            result[where] = orders[number][first:last]
            taken[number] = last
        return result


class CategoryDrawIterFactory(AbsIterFactory):
    """Builds the iterator of an epoch from what is drawn for it.

    Args:
        dataset: ESPnet's, by clip.
        draw: makes the batches.
        num_iters: batches of an epoch, of all ranks together.
        collate_fn: ESPnet's interface.
        rank: of this process; it gets every ``world_size``-th clip of each batch.
        world_size: number of processes.
        options: further ones of DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset,
        draw: CategoryDraw,
        num_iters: int,
        collate_fn: Callable,
        rank: int = 0,
        world_size: int = 1,
        **options: Any,
    ) -> None:
        self.dataset, self.draw, self.num_iters = dataset, draw, num_iters
        self.collate_fn, self.options = collate_fn, options
        self.rank, self.world_size = rank, world_size

    def build_iter(self, epoch: int, shuffle: bool | None = None) -> DataLoader:
        """Iterate over an epoch; ``shuffle``, of ESPnet's interface, has no effect."""
        batches: Sequence[list[str]] = [
            batch[self.rank :: self.world_size]
            for batch in self.draw.batches(epoch, self.num_iters)
        ]
        return DataLoader(
            self.dataset,
            batch_sampler=batches,
            collate_fn=self.collate_fn,
            **self.options,
        )

"""ESPnet2's task of classification, for corpora of millions of clips.

ESPnet's sampler ``catpow`` draws as many clips as the corpus has, one by one and before
every epoch, though an epoch of ``num_iters_per_epoch`` batches uses a part of them: of
the two million clips of AudioSet a tenth. Here no more is drawn, and by numpy.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from espnet2.iterators.abs_iter_factory import AbsIterFactory
from espnet2.tasks import cls as espnet_cls
from espnet2.train.dataset import ESPnetDataset
from torch.utils.data import DataLoader, Dataset

from espnet2_spear.fileio.datadir import read_table
from espnet2_spear.fileio.tables import DataDirError


class CategoryDraw(AbsIterFactory):
    """Epochs of clips in which classes are drawn by weight.

    P(class) = (n_class / sum of n)^factor, normalised; n are the samples of a class.
    Within a class clips come in a random order, each once before any comes again.

    Args:
        dataset: ESPnet's, by clip.
        category2utt: table of a class and its clips.
        sizes: clip -> samples.
        num_iters: batches of an epoch, of all ranks together.
        factor: 0 draws all classes equally often, 1 in proportion to their samples.
        batch_bins: a batch ends with the clip that makes it longer, in samples.
        min_batch_size: clips of a batch, at least.
        max_batch_size: clips of a batch, at most; None: any number.
        seed: of all epochs, not negative.
        rank: of this process; it gets every ``world_size``-th clip of each batch.
        world_size: number of processes.
        options: further ones of DataLoader.

    Raises:
        DataDirError: no classes, or a clip of unknown length.
    """

    def __init__(
        self,
        dataset: Dataset,
        category2utt: str | Path,
        sizes: Mapping[str, int],
        num_iters: int,
        factor: float,
        batch_bins: int,
        min_batch_size: int = 1,
        max_batch_size: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        **options: Any,
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
        self.dataset, self.num_iters, self.options = dataset, num_iters, options
        self._bins, self.seed = batch_bins, seed
        self._least, self._most = min_batch_size, max_batch_size
        self.rank, self.world_size = rank, world_size

    def build_iter(self, epoch: int, shuffle: bool | None = None) -> DataLoader:
        """Iterate over an epoch; ``shuffle``, of ESPnet's interface, has no effect."""
        parts = [x[self.rank :: self.world_size] for x in self.batches(epoch)]
        return DataLoader(self.dataset, batch_sampler=parts, **self.options)

    def batches(self, epoch: int) -> list[list[str]]:
        """Batches of clips of all ranks: the same for the same epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        orders = [rng.permutation(clips) for clips in self._classes]
        taken = [0] * len(orders)
        batches: list[list[str]] = []
        batch, bins = [], 0
        while True:
            for drawn in rng.choice(len(orders), 1000, p=self._shares).tolist():
                place = orders[drawn][taken[drawn] % len(orders[drawn])]
                taken[drawn] += 1
                batch.append(self._utts[place])
                bins += self._sizes[place]
                full = bins > self._bins and len(batch) >= self._least
                if full or len(batch) == self._most:
                    batches.append(batch)
                    batch, bins = [], 0
                    if len(batches) == self.num_iters:
                        return batches


class CLSTask(espnet_cls.CLSTask):
    """ESPnet's own, but ``catpow`` draws no more than ``num_iters_per_epoch`` need."""

    @classmethod
    def build_category_iter_factory(
        cls, args: argparse.Namespace, iter_options: Any, mode: str
    ) -> AbsIterFactory:
        """Build what ``--iterator_type category`` reads.

        Raises:
            DataDirError: ``category2utt`` beside the first data file, or the shape
                file, is missing or does not fit.
        """
        count = iter_options.num_iters_per_epoch
        if iter_options.batch_type != "catpow" or not (iter_options.train and count):
            return super().build_category_iter_factory(args, iter_options, mode)
        dataset = ESPnetDataset(
            iter_options.data_path_and_name_and_type,
            float_dtype=args.train_dtype,
            preprocess=iter_options.preprocess_fn,
            max_cache_size=iter_options.max_cache_size,
            max_cache_fd=iter_options.max_cache_fd,
            allow_multi_rates=iter_options.allow_multi_rates,
        )
        cls.check_task_requirements(
            dataset, args.allow_variable_data_keys, train=iter_options.train
        )
        world_size, rank = 1, 0
        if iter_options.distributed:
            world_size = torch.distributed.get_world_size()
            rank = torch.distributed.get_rank()
        first, *_ = iter_options.data_path_and_name_and_type[0]
        (shapes,) = iter_options.shape_files
        sizes = read_table(Path(shapes), "utterance samples")
        return CategoryDraw(
            dataset,
            Path(first).parent / "category2utt",
            {utt: int(size.split(",")[0]) for utt, size in sizes.items()},
            count,
            args.upsampling_factor,
            iter_options.batch_bins,
            max(args.min_batch_size, world_size),
            args.max_batch_size,
            args.seed,
            rank,
            world_size,
            collate_fn=iter_options.collate_fn,
            num_workers=args.num_workers,
            pin_memory=args.ngpu > 0,
        )

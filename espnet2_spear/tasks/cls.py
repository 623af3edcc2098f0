"""ESPnet2's task of classification, for corpora of millions of clips."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from espnet2.iterators.abs_iter_factory import AbsIterFactory
from espnet2.tasks import cls as espnet_cls
from espnet2.train.dataset import ESPnetDataset

from espnet2_spear.data.category_draw import CategoryDraw, CategoryDrawIterFactory
from espnet2_spear.fileio.datadir import read_table


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
        draw = CategoryDraw(
            Path(first).parent / "category2utt",
            {utt: int(size.split(",")[0]) for utt, size in sizes.items()},
            args.upsampling_factor,
            iter_options.batch_bins,
            max(args.min_batch_size, world_size),
            args.max_batch_size,
            args.seed,
        )
        return CategoryDrawIterFactory(
            dataset,
            draw,
            count,
            iter_options.collate_fn,
            rank,
            world_size,
            num_workers=args.num_workers,
            pin_memory=args.ngpu > 0,
        )

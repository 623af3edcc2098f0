"""From ESPnet's options to the iterators of SPEAR's pre-training."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from espnet2.train.dataset import DATA_TYPES
from espnet2.utils.nested_dict_action import NestedDictAction

from espnet2_spear.data.dataset import ManifestDataset
from espnet2_spear.data.iter_factory import (
    FixedBatches,
    RowBatches,
    SpearIterFactory,
    StepBatches,
    check_parts,
)
from espnet2_spear.data.manifest import Lists, open_manifest
from espnet2_spear.data.sampler import SamplerConfig, StepSampler, validation_batches
from espnet2_spear.data.skipping import SkipLimits, SkipLog
from espnet2_spear.fileio.ark import MatricesByName

Config = TypeVar("Config")
TYPES = {"speech": ("sound",), "domain": ("text",)}
CODES_STORE = "codes_store"
BATCH_TYPES = ("numel", "length")
CODES_TYPES = ("kaldi_ark", CODES_STORE)


def register_data_types() -> None:
    """Make ``FILE.scp,codes_<teacher>,codes_store`` possible; can be called again."""
    DATA_TYPES.setdefault(
        CODES_STORE,
        {
            "func": MatricesByName,
            "kwargs": [],
            "help": "As kaldi_ark, but the scp file is not held in memory",
        },
    )


def add_sampling_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the options of ``--iterator_type task``."""
    group.add_argument(
        "--sampler_conf",
        action=NestedDictAction,
        default=dict(),
        help="With --iterator_type task: fields of SamplerConfig (domain_weights, "
        "corpus_weights, num_buckets, mix_headroom_seconds, max_utts, step_shards)",
    )
    group.add_argument(
        "--bad_data_conf",
        action=NestedDictAction,
        default=dict(),
        help="With --iterator_type task: fields of SkipLimits (max_utterances, "
        "max_share), past which utterances that cannot be read stop the training",
    )
    group.add_argument(
        "--manifest_dir",
        type=str,
        default=None,
        help="With --iterator_type task: where the index of the lists is kept, by "
        "default OUTPUT_DIR/manifest",
    )


def build_iter_factory(
    args: argparse.Namespace,
    iter_options: Any,
    mode: str,
    max_extension: float = 0.0,
) -> SpearIterFactory:
    """Build what SpearTask's ``build_task_iter_factory`` returns.

    Args:
        args: all options.
        iter_options: ESPnet's IteratorOptions.
        mode: ``train``, ``valid`` or ``plot_att``.
        max_extension: seconds by which mixing may make a batch of training longer than
            its longest utterance.

    Raises:
        DataDirError: lists that do not fit together, or data that does not fit the
            bounds.
        ValueError: options that do not fit together or with the number of ranks.
    """
    world_size, rank = 1, 0
    if iter_options.distributed:
        world_size = torch.distributed.get_world_size()
        rank = torch.distributed.get_rank()
    config = _sampler_config(args)
    lists = _sources(iter_options.data_path_and_name_and_type, iter_options.shape_files)
    manifest = open_manifest(
        args.manifest_dir or Path(args.output_dir) / "manifest",
        lists,
        args.domains,
        tuple(config.corpus_weights) if iter_options.train else (),
    )
    dataset = ManifestDataset(
        manifest,
        iter_options.preprocess_fn,
        args.train_dtype,
        substitute=iter_options.train,
    )
    bound: int | None = int(iter_options.batch_bins) // world_size
    batches: RowBatches
    if iter_options.train:
        parts = world_size * args.accum_grad
        shards = config.step_shards or parts
        if config.step_shards is None and world_size > 1 and rank == 0:
            logging.warning(
                f"sampler_conf.step_shards is not set, so the steps, and the results, "
                f"are those of {world_size} ranks times accum_grad={args.accum_grad} "
                f"and change with either; --sampler_conf step_shards={parts} keeps "
                f"these for all numbers whose product divides {parts}"
            )
        config = _with_headroom(config, max_extension)
        bins = int(iter_options.batch_bins) * args.accum_grad
        sampler = StepSampler(manifest, config, bins // shards, shards, args.seed)
        sampler.log()
        num_iters = iter_options.num_iters_per_epoch
        if num_iters is None:
            num_iters = max(1, round(sampler.steps_per_pass)) * args.accum_grad
        batches = StepBatches(sampler, num_iters, args.accum_grad, world_size, rank)
    elif mode == "plot_att":
        count = min(iter_options.num_batches, len(manifest))
        # Spread over the manifest, and so over its domains and lengths.
        rows = [len(manifest) * (2 * i + 1) // (2 * count) for i in range(count)]
        batches, bound = FixedBatches([[row] for row in rows]), None
    else:
        every = validation_batches(manifest.samples, bound, config.max_utts, world_size)
        batches = FixedBatches(every[rank::world_size])
    logging.info(f"[{mode}] dataset: {dataset}")
    return SpearIterFactory(
        dataset,
        batches,
        iter_options.collate_fn,
        SkipLog(
            Path(args.output_dir) / f"skipped_{mode}.rank{rank}.txt",
            _config(SkipLimits, "bad_data_conf", args),
        ),
        name=mode,
        bound=bound,
        num_workers=args.num_workers,
        pin_memory=args.ngpu > 0,
    )


def _with_headroom(config: SamplerConfig, max_extension: float) -> SamplerConfig:
    """Leave room for what mixing adds; a value that was set stays, with a warning."""
    headroom = config.mix_headroom_seconds
    if headroom is None:
        return replace(config, mix_headroom_seconds=max_extension)
    if headroom < max_extension:
        logging.warning(
            f"sampler_conf.mix_headroom_seconds={headroom:g}, but mixer_conf may make "
            f"utterances {max_extension:g} s longer: batches may exceed batch_bins "
            f"by {max_extension - headroom:g} s an utterance; leave it out, or set "
            f"it to {max_extension:g}"
        )
    return config


def check_sampling_options(args: argparse.Namespace) -> None:
    """Look at the sampler's options before any data.

    Raises:
        ValueError: options that do not fit together, or of an iterator that has none.
    """
    if args.iterator_type in ("task", "none"):
        config = _sampler_config(args)
        _config(SkipLimits, "bad_data_conf", args)
        _check_batches(args, config)
        return
    for option in ("sampler_conf", "bad_data_conf", "manifest_dir"):
        if getattr(args, option):
            raise ValueError(
                f"{option} has no effect with iterator_type '{args.iterator_type}'; "
                "use iterator_type 'task'"
            )


def _check_batches(args: argparse.Namespace, config: SamplerConfig) -> None:
    if args.iterator_type != "task":
        return
    kinds = {"batch_type": args.batch_type}
    if args.valid_iterator_type in (None, "task"):
        kinds["valid_batch_type"] = args.valid_batch_type or args.batch_type
    for option, value in kinds.items():
        if value not in BATCH_TYPES:
            raise ValueError(
                f"{option} '{value}': with iterator_type 'task', batches are bounded "
                "by batch_bins: use 'numel'"
            )
    whole = args.accum_grad  # what is not set yet will be a multiple of it
    shards, batches = config.step_shards or whole, args.num_iters_per_epoch or whole
    check_parts(shards, batches, whole)


def _sampler_config(args: argparse.Namespace) -> SamplerConfig:
    config = _config(SamplerConfig, "sampler_conf", args)
    if unknown := sorted(set(config.domain_weights) - set(args.domains)):
        raise ValueError(
            f"sampler_conf.domain_weights: '{unknown[0]}' is not one of --domains "
            f"{args.domains}"
        )
    return config


def _config(kind: type[Config], option: str, args: argparse.Namespace) -> Config:
    try:
        return kind(**getattr(args, option))
    except TypeError as error:
        raise ValueError(f"{option}: {error}") from None


def _sources(
    entries: Sequence[tuple[str, str, str]], shape_files: Sequence[str]
) -> Lists:
    """The lists among ESPnet's data options."""
    files, domain = {}, None
    for path, name, kind in entries:
        allowed = CODES_TYPES if name.startswith("codes_") else TYPES.get(name, ())
        if kind not in allowed:
            raise ValueError(
                f"{path},{name},{kind}: with iterator_type 'task', speech is 'sound', "
                f"domain is 'text' and codes_<teacher> {' or '.join(CODES_TYPES)}; use "
                "iterator_type 'sequence' for other data"
            )
        if name == "domain":
            domain = path
        else:
            files[name] = path
    if domain is None or "speech" not in files or len(shape_files) != 1:
        raise ValueError(
            "with iterator_type 'task', data named speech and domain are needed, and "
            f"one shape file (utt2num_samples), not {len(shape_files)}"
        )
    return Lists(shape_files[0], domain, files)

#!/usr/bin/env python3
"""Compute a student's hidden states of recordings, as Kaldi ark or npy files.

Recordings of like lengths are encoded together. Work is done in shards, each with a
mark when it is finished: run the same command again after an interruption, and what is
there is verified by its checksum and kept. What cannot be used is listed in
skipped.txt with the reason.
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from pathlib import Path

import torch

from espnet2_spear.errors import UserError
from espnet2_spear.fileio.explain import add_batch_options, command, option_parser
from espnet2_spear.hub.extraction import (
    ExtractionRun,
    Extractor,
    parse_layers,
)
from espnet2_spear.hub.load import load_model
from espnet2_spear.hub.recordings import find_recordings


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = option_parser(__doc__)
    parser.add_argument(
        "inputs",
        nargs="+",
        help="audio files, wav.scp tables, or Kaldi data directories",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="student: experiment folder, .pth, packed model, or released folder",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument(
        "--layer",
        default="last",
        help="numbers from 0 with commas between (negative: from the last), last, all, "
        "or output, which differs from last in students of 25 Hz",
    )
    parser.add_argument(
        "--format",
        choices=["ark", "npy"],
        default="ark",
        help="one Kaldi ark a shard, or one .npy (frames, channels) an utterance",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "float16"], default="float32", help="of npy"
    )
    parser.add_argument(
        "--padding",
        choices=["exact", "compatible"],
        default="exact",
        help="exact: features do not depend on what else is in a batch; compatible: as "
        "the published code computes them, by batch",
    )
    parser.add_argument(
        "--max_seconds",
        type=float,
        default=60.0,
        help="longer recordings are encoded in overlapping pieces of this length",
    )
    parser.add_argument(
        "--context_seconds",
        type=float,
        default=8.0,
        help="what such a piece sees before and behind what is kept of it",
    )
    add_batch_options(parser, 60.0)
    parser.add_argument(
        "--num_workers", type=int, default=2, help="threads that read audio ahead"
    )
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Compute the features; see ``--help``.

    Raises:
        UserError: options that do not fit, or not one recording could be used.
        CheckpointError, DataDirError: a model or a table that cannot be read.

    Example:
        % python -m espnet2_spear.bin.spear_extract --model exp/spear_mini \\
            --layer all --out exp/features dump/raw/en_test/wav.scp
    """
    if args.format == "ark" and args.dtype != "float32":
        raise UserError("--dtype float16: Kaldi arks hold float32; use --format npy")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    torch.set_flush_denormal(True)
    model = load_model(args.model, args.padding)
    layers = parse_layers(args.layer, model.num_layers)
    recordings, skipped = find_recordings(args.inputs)
    extractor = Extractor(
        model.to(args.device), layers, args.max_seconds, args.context_seconds
    )
    extraction = ExtractionRun(
        extractor,
        args.out,
        args.format,
        args.dtype,
        args.batch_seconds,
        args.shard_seconds,
        args.num_workers,
    )
    tables = extraction(recordings, skipped)
    skipped = extraction.skipped
    if skipped:
        reasons = Counter(reason for reason, _ in skipped.values())
        counts = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
        logging.warning(
            f"skipped {len(skipped)} recordings ({counts}), listed in "
            f"{args.out}/skipped.txt"
        )
    if not extraction.frames:
        raise UserError(
            f"not one of {len(skipped)} recordings could be used; the reasons are in "
            f"{args.out}/skipped.txt"
        )
    logging.info(
        f"{', '.join(map(str, tables))}: {sum(extraction.frames.values())} frames of "
        f"{len(extraction.frames)} recordings"
    )


if __name__ == "__main__":
    main()

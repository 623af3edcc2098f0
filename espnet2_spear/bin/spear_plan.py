#!/usr/bin/env python3
"""Say what a pre-training takes on GPUs that are not at hand.

Parameters, operations, memory by part with and without activation checkpointing, the
largest batch, days, what the data loaders have to read, and the disk. Memory and
operations are those of a simulated step, see ``train/simulate.py``.
"""

from __future__ import annotations

import argparse
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.errors import UserError
from espnet2_spear.fileio.explain import command, option_parser
from espnet2_spear.fileio.tables import markdown_table
from espnet2_spear.tasks.spear import SpearTask
from espnet2_spear.train.average import disk_bytes
from espnet2_spear.train.simulate import StepCosts, simulate_step


class Gpu(NamedTuple):
    """A GPU: memory, and dense TFLOP/s, by its maker's data sheet.

    Attributes:
        gib: memory as nvidia-smi shows it.
        half: TFLOP/s in bfloat16 and float16; None: not known.
        single: TFLOP/s in float32, without TF32.
    """

    gib: float
    half: float | None = None
    single: float | None = None


GPUS = {
    "h200": Gpu(140.4, 989, 67),
    "h100": Gpu(79.6, 989, 67),
    "a100-80": Gpu(80.0, 312, 19.5),
    "a100-40": Gpu(40.0, 312, 19.5),
    "l40s": Gpu(45.0, 362, 91.6),
}
GIB = 2**30
BUCKETS = 4  # bytes a parameter: DDP copies gradients into buckets


def parse_gpu(text: str) -> Gpu:
    """Read a name of ``GPUS``, or a size such as 24GB.

    Raises:
        UserError: neither.
    """
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?G(i?)B", text, re.IGNORECASE)
    if size and float(size[1]) > 0:
        return Gpu(float(size[1]))
    if text.lower() not in GPUS:
        raise UserError(
            f"--gpu {text}: name one of {', '.join(GPUS)}, or its memory, such as 24GB"
        )
    return GPUS[text.lower()]


def build(
    options: argparse.Namespace, checkpointing: bool
) -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
    """Model and optimizers of a training, without compilation."""
    options = argparse.Namespace(**vars(options))
    options.compile = False
    options.mixer_conf = {}  # the sampler leaves room for what it adds
    changes = {"activation_checkpointing": checkpointing}
    options.student_conf = {**options.student_conf, **changes}
    model = SpearTask.build_model(options).train()
    return model, SpearTask.build_optimizers(options, model)


def make_batch(
    options: argparse.Namespace, utts: int, seconds: float
) -> dict[str, torch.Tensor]:
    """A silent batch of utterances of equal length, of all domains."""
    samples = int(seconds * SAMPLE_RATE)
    batch = {
        "speech": torch.zeros(utts, samples),
        "speech_lengths": torch.full((utts,), samples),
        "domain": torch.arange(utts)[:, None] % len(options.domains),
    }
    for name, conf in options.teachers.items():
        frames = int(seconds * conf.get("frame_rate", 50.0))
        shape = (utts, frames, conf["num_codebooks"])
        batch[f"codes_{name}"] = torch.zeros(shape, dtype=torch.long)
    return batch


def simulate(
    options: argparse.Namespace, checkpointing: bool, utts: int, seconds: float
) -> StepCosts:
    """Costs of a batch of utterances of equal length."""
    random.seed(0)
    return simulate_step(
        lambda: build(options, checkpointing),
        lambda: make_batch(options, utts, seconds),
        torch.bfloat16 if options.use_amp else None,
    )


def plan(path: Path, gpu: Gpu, args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Plan a configuration, without and with activation checkpointing.

    Args:
        path: of the configuration.
        gpu: memory and speed.
        args: of this command.

    Yields:
        a row of the table: heading -> cell.

    Raises:
        UserError: not one utterance fits, even with activation checkpointing.
    """
    parser = SpearTask.get_parser()
    command = ["--config", str(path), "--output_dir", "unused", *args.options]
    options = parser.parse_args(command)
    if not options.num_iters_per_epoch:
        raise UserError(f"{path}: has no num_iters_per_epoch: add it, to count steps")
    samples = options.batch_bins / args.num_gpus  # of a batch on a GPU
    longest = min(args.utterance_seconds, samples / SAMPLE_RATE)
    utts = math.ceil(samples / SAMPLE_RATE / longest)
    batches = options.num_iters_per_epoch * options.max_epoch
    peak = gpu.half if options.use_amp else gpu.single
    usable = (1 - args.reserve) * gpu.gib * GIB
    with torch.device("meta"):
        model, _ = build(options, False)
    parameters = sum(p.numel() for p in model.parameters())
    for checkpointing in (False, True):
        seconds = samples / SAMPLE_RATE / utts
        costs = simulate(options, checkpointing, utts, seconds)
        buckets = BUCKETS * parameters if args.num_gpus > 1 else 0
        lasting = costs.lasting + buckets
        a_sample = (costs.peak - costs.lasting) / samples
        fitting = max(0.0, usable - lasting) / a_sample
        one_fits = fitting >= longest * SAMPLE_RATE
        if not one_fits and checkpointing:
            needed = (lasting + a_sample * longest * SAMPLE_RATE) / GIB
            raise UserError(
                f"--gpu {args.gpu}: not one utterance of {longest:.3g} s fits: "
                f"{path.name} needs {needed / (1 - args.reserve):.1f} GiB for it, with "
                "activation checkpointing; take a larger GPU, a smaller --student or "
                "shorter utterances (--utterance_seconds, spear_filter)"
            )
        days = rate = "-"
        if peak is not None:
            step = costs.operations / (args.share * peak * 1e12)
            days = f"{batches * step / 86400:.3g}"
            rate = f"{options.batch_bins / SAMPLE_RATE / step:.0f}"
        memory = {
            "weights": costs.weights,
            "gradients": costs.gradients,
            "optimizer": costs.optimizer,
            "activations": costs.activations,
            "heads": costs.heads,
            "in passing": costs.passing,
            "GiB in all": costs.peak + buckets,
        }
        yield {
            "configuration": path.stem.removeprefix("train_spear_"),
            "checkpointing": "yes" if checkpointing else "no",
            "M parameters": f"{parameters / 1e6:.1f}",
            "TFLOP a batch": f"{costs.operations / 1e12:.3g}",
            **{part: f"{size / GIB:.2f}" for part, size in memory.items()},
            "fits": "yes" if costs.peak + buckets <= usable else "no",
            "largest batch_bins": str(int(fitting * args.num_gpus) if one_fits else 0),
            "days": days,
            "x real time": rate,
            "disk, GB": f"{disk_bytes(parameters, vars(options)) / 1e9:.3g}",
        }


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = option_parser(__doc__)
    parser.add_argument("--config", type=Path, nargs="+", required=True)
    parser.add_argument(
        "--gpu", required=True, help=f"{', '.join(GPUS)}, or its memory, such as 24GB"
    )
    parser.add_argument("--num_gpus", type=int, default=8)
    parser.add_argument(
        "--share", type=float, default=0.1, help="of the GPU's peak that is used"
    )
    parser.add_argument(
        "--reserve",
        type=float,
        default=0.1,
        help="share of the memory for CUDA, NCCL and fragments",
    )
    parser.add_argument(
        "--utterance_seconds",
        type=float,
        default=30.0,
        help="the longest: a batch of such takes the most memory",
    )
    parser.add_argument(
        "options", nargs="*", help="of spear_train, after --: -- --batch_bins 9600000"
    )
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Print a table; see ``--help``.

    Raises:
        UserError: an option out of its range, or no utterance fits.
    """
    gpu = parse_gpu(args.gpu)
    if args.num_gpus < 1 or args.utterance_seconds <= 0:
        raise UserError("--num_gpus and --utterance_seconds: at least 1, above 0")
    if not (0 < args.share <= 1 and 0 <= args.reserve < 1):
        raise UserError("--share and --reserve: shares, such as 0.1 of 1")
    table: list[dict[str, str]] = []
    refused = []
    for path in args.config:
        try:
            table += plan(path, gpu, args)
        except UserError as error:
            refused.append(str(error))
    if table:
        print(markdown_table(list(table[0]), [list(row.values()) for row in table]))
    if refused:
        raise UserError("\n".join(refused))
    print(
        f"\n{args.num_gpus} x {args.gpu}: {(1 - args.reserve) * gpu.gib:.1f} of "
        f"{gpu.gib:g} GiB each, {args.share:.0%} of the peak, utterances of "
        f"{args.utterance_seconds:g} s. Memory in GiB on a GPU; all of it includes "
        "DDP's buckets of gradients. x real time is what all loaders have to read; one "
        "worker read 5867 times real time where it was measured (benchmarks/README.md)"
    )


if __name__ == "__main__":
    main()

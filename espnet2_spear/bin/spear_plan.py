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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.errors import UserError
from espnet2_spear.fileio.explain import main_with_one_line_errors
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
HEAD = (
    "configuration",
    "checkpointing",
    "M parameters",
    "TFLOP a batch",
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "heads",
    "in passing",
    "GiB in all",
    "fits",
    "largest batch_bins",
    "days",
    "x real time",
    "disk, GB",
)


class Plan(NamedTuple):
    """A training on GPUs, with or without activation checkpointing.

    Attributes:
        name: of the configuration.
        checkpointing: whether layers are computed again in the backward pass.
        parameters: of student and heads.
        costs: of a batch on a GPU, as long as ``batch_bins`` says.
        needed: bytes on a GPU.
        largest: ``batch_bins`` that fit on all GPUs; 0: not one utterance.
        days: for all steps; None: the GPU's speed is not known.
        rate: seconds of audio that all GPUs hear in a second; None, as above.
        disk: bytes, while it trains.
    """

    name: str
    checkpointing: bool
    parameters: int
    costs: StepCosts
    needed: float
    largest: int
    days: float | None
    rate: float | None
    disk: float

    def row(self, gib: float) -> list[str]:
        """Cells of the table, for a GPU of so many GiB to be used."""
        costs = self.costs
        parts = [costs.weights, costs.gradients, costs.optimizer, costs.activations]
        parts += [costs.heads, costs.passing, self.needed]
        return [
            self.name,
            "yes" if self.checkpointing else "no",
            f"{self.parameters / 1e6:.1f}",
            f"{costs.operations / 1e12:.3g}",
            *(f"{part / GIB:.2f}" for part in parts),
            "yes" if self.needed <= gib * GIB else "no",
            str(self.largest),
            "-" if self.days is None else f"{self.days:.3g}",
            "-" if self.rate is None else f"{self.rate:.0f}",
            f"{self.disk / 1e9:.3g}",
        ]


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


def plan(path: Path, gpu: Gpu, args: argparse.Namespace) -> Iterator[Plan]:
    """Plan a configuration, without and with activation checkpointing.

    Args:
        path: of the configuration.
        gpu: memory and speed.
        args: of this command.

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
        if fitting < longest * SAMPLE_RATE and checkpointing:
            needed = (lasting + a_sample * longest * SAMPLE_RATE) / GIB
            raise UserError(
                f"--gpu {args.gpu}: not one utterance of {longest:.3g} s fits: "
                f"{path.name} needs {needed / (1 - args.reserve):.1f} GiB for it, with "
                "activation checkpointing; take a larger GPU, a smaller --student or "
                "shorter utterances (--utterance_seconds, spear_filter)"
            )
        days = rate = None
        if peak is not None:
            step = costs.operations / (args.share * peak * 1e12)
            days, rate = batches * step / 86400, options.batch_bins / SAMPLE_RATE / step
        yield Plan(
            path.stem.removeprefix("train_spear_"),
            checkpointing,
            parameters,
            costs,
            lasting + a_sample * samples,
            int(fitting * args.num_gpus) if fitting >= longest * SAMPLE_RATE else 0,
            days,
            rate,
            disk_bytes(parameters, vars(options)),
        )


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, nargs="+", required=True)
    parser.add_argument(
        "--gpu", required=True, help=f"{', '.join(GPUS)}, or its memory, such as 24GB"
    )
    parser.add_argument("--num_gpus", type=int, default=8)
    parser.add_argument(
        "--share", type=float, default=0.1, help="of the GPU's peak that is used [0.1]"
    )
    parser.add_argument(
        "--reserve",
        type=float,
        default=0.1,
        help="share of the memory for CUDA, NCCL and fragments [0.1]",
    )
    parser.add_argument(
        "--utterance_seconds",
        type=float,
        default=30.0,
        help="the longest: a batch of such takes the most memory [30]",
    )
    parser.add_argument(
        "options", nargs="*", help="of spear_train, after --: -- --batch_bins 9600000"
    )
    return parser


def main(cmd: list[str] | None = None) -> None:
    """Print a table; see ``--help``.

    Raises:
        UserError: an option out of its range, or no utterance fits.
    """
    main_with_one_line_errors(get_parser(), run, cmd)


def run(args: argparse.Namespace) -> None:
    """Print the table and what its figures take for granted."""
    gpu = parse_gpu(args.gpu)
    if args.num_gpus < 1 or args.utterance_seconds <= 0:
        raise UserError("--num_gpus and --utterance_seconds: at least 1, above 0")
    if not (0 < args.share <= 1 and 0 <= args.reserve < 1):
        raise UserError("--share and --reserve: shares, such as 0.1 of 1")
    usable = (1 - args.reserve) * gpu.gib
    plans = [p for path in args.config for p in plan(path, gpu, args)]
    print_table([HEAD, ["---"] * len(HEAD), *(p.row(usable) for p in plans)])
    print(
        f"\n{args.num_gpus} x {args.gpu}: {usable:.1f} of {gpu.gib:g} GiB each, "
        f"{args.share:.0%} of the peak, utterances of {args.utterance_seconds:g} s. "
        "Memory in GiB on a GPU; all of it includes DDP's buckets of gradients"
    )


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells as Markdown, aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

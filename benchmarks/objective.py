#!/usr/bin/env python3
"""Prediction heads in chunks beside heads that make all logits at once, on a CPU.

Memory that autograd keeps and peak memory of forward and backward, with the encoder's
own beside them; time of the heads, both versions in turn, and of the whole step.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import MIB, fresh, in_turn, kept_bytes, read_peak, reset_peak, resident
from torch import Tensor

from espnet2_spear.fileio.explain import add_options, option_parser
from espnet2_spear.spear.objective import CodebookHead
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import ZipformerConfig

SIZE = 256
VARIANTS = ("encoder", "plain", "chunked")


def plain_loss(head: CodebookHead, hidden: Tensor, targets: Tensor) -> Tensor:
    """Frames that have a target, all their logits at once; accuracy as well."""
    selected = (targets >= 0).any(dim=1)
    chosen = targets[selected]
    logits = head.logits(hidden[selected])
    entropy = F.cross_entropy(
        logits.flatten(0, 1), chosen.flatten(), ignore_index=-1, reduction="none"
    ).view(chosen.shape)
    (logits.argmax(dim=-1) == chosen).float().mean()
    return entropy.mean(dim=1).sum()


def chunked_loss(head: CodebookHead, hidden: Tensor, targets: Tensor) -> Tensor:
    """The package's own."""
    return head(hidden, targets, torch.ones(hidden.size(0))).loss


LOSSES = {"plain": plain_loss, "chunked": chunked_loss}
Heads = list[tuple[CodebookHead, Tensor]]


def make_heads(args: argparse.Namespace, dim: int, frames: int) -> Heads:
    """Heads of both teachers with targets; the second sees a share of the frames."""
    heads = []
    shares = (1.0, args.audio_share)
    for count, share in zip(args.codebooks, shares, strict=True):
        targets = torch.randint(SIZE, (frames, count))
        targets[round(share * frames) :] = -1
        heads.append((CodebookHead(dim, count, SIZE), targets))
    return heads


def make_student(args: argparse.Namespace) -> SpearEncoder:
    """The encoder, without regularisers: what they keep is a matter of chance."""
    conf = {"name": args.student, "output_downsampling_factor": args.downsampling}
    return SpearEncoder(ZipformerConfig.from_dict(conf | {"regularize": False})).train()


def total_loss(kind: str, heads: Heads, hidden: Tensor) -> Tensor:
    """Sum over the heads; for ``encoder`` the cheapest loss there is."""
    if kind == "encoder":
        return hidden.sum()
    return sum(LOSSES[kind](head, hidden, targets) for head, targets in heads)


def step_of(args: argparse.Namespace, variant: str) -> Callable[[], None]:
    """Forward and backward of encoder and heads."""
    torch.manual_seed(args.seed)
    student = make_student(args)
    fbank = torch.randn(args.utts, round(100 * args.seconds) + 7, 128)
    lengths = torch.full((args.utts,), fbank.size(1))
    frames = args.utts * int(student.encoder_embed.output_lengths(fbank.size(1)))
    frames = -(-frames // args.downsampling)
    heads = make_heads(args, student.output_size(), frames)

    def step() -> None:
        hidden = student.encode(fbank, lengths).encoder_out.flatten(0, 1)
        total_loss(variant, heads, hidden[:frames]).backward()

    return step


def peak_of_step(args: argparse.Namespace, variant: str) -> int:
    """Peak of a step above what the process holds before it, in bytes."""
    torch.set_num_threads(args.num_threads)
    step = step_of(args, variant)
    step()  # gradients exist from here on
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed does not count
    cpu, before = torch.device("cpu"), resident()
    reset_peak(cpu)
    step()
    return read_peak(cpu) - before


def report_memory(args: argparse.Namespace) -> None:
    """Print what is kept, and the peaks of fresh processes."""
    torch.manual_seed(args.seed)
    student = make_student(args)
    fbank = torch.randn(args.utts, round(100 * args.seconds) + 7, 128)
    lengths = torch.full((args.utts,), fbank.size(1))

    def encode() -> Tensor:
        return student.encode(fbank, lengths).encoder_out

    with kept_bytes(student.parameters()) as sizes:
        encode()
    encoder = sum(sizes.values())
    with torch.no_grad():
        hidden = encode().flatten(0, 1)
    heads = make_heads(args, hidden.size(1), hidden.size(0))
    hidden.requires_grad_()
    own = [hidden, *(p for head, _ in heads for p in head.parameters())]
    print(f"{hidden.size(0)} frames of {hidden.size(1)}, codebooks {args.codebooks}")
    print(f"kept by the encoder: {encoder / MIB:.1f} MiB")
    for kind in LOSSES:
        with kept_bytes(own) as sizes:
            total_loss(kind, heads, hidden)
        size = sum(sizes.values())
        print(f"kept by {kind} heads: {size / MIB:.1f} MiB, {size / encoder:.3f} of it")
    peaks = {variant: fresh(peak_of_step, args, variant) for variant in VARIANTS}
    for variant, peak in peaks.items():
        ratio = peak / peaks["encoder"]
        print(f"peak with {variant}: {peak / MIB:.0f} MiB, {ratio:.3f}")


def report_time(args: argparse.Namespace) -> None:
    """Print the time of the heads, the two versions in turn."""
    torch.manual_seed(args.seed)
    dim = ZipformerConfig.from_name(args.student).encoder_dim[-1]
    frames = round(50 * args.seconds * args.utts / args.downsampling)
    hidden = torch.randn(frames, dim, requires_grad=True)
    heads = make_heads(args, dim, frames)
    calls = {
        kind: lambda kind=kind: total_loss(kind, heads, hidden).backward()
        for kind in LOSSES
    }
    times = in_turn(calls, args.trials)
    ratios = [c / p for c, p in zip(times["chunked"], times["plain"], strict=True)]
    for kind, values in times.items():
        print(f"heads, {kind}: {1000 * statistics.median(values):.0f} ms")
    print(
        f"chunked / plain: {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f} of {len(ratios)})"
    )


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = option_parser(__doc__)
    add_options(parser, student="base", seconds=15.0, utts=4, trials=7, num_threads=1)
    add_options(parser, seed=0)
    parser.add_argument("--downsampling", type=int, default=1, help="2: 25 Hz")
    parser.add_argument("--codebooks", type=int, nargs=2, default=[16, 8])
    parser.add_argument(
        "--audio_share", type=float, default=1.0, help="frames with the second's codes"
    )
    parser.add_argument(
        "--part", choices=["memory", "time"], nargs="+", default=["memory", "time"]
    )
    return parser


def main(cmd: list[str] | None = None) -> None:
    """Measure; see ``--help``."""
    args = get_parser().parse_args(cmd)
    torch.set_num_threads(args.num_threads)
    if "memory" in args.part:
        report_memory(args)
    if "time" in args.part:
        report_time(args)


if __name__ == "__main__":
    main()

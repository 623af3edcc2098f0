#!/usr/bin/env python3
"""Speed, memory and codes of the quantizer, beside the multi-quantization library."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from measure import MIB, fresh, in_turn, product_rate, read_peak, reset_peak
from mvq_codes import compare_grid, compare_passes
from peer import (
    load_peer,
    noisy_vectors,
    peer_codes,
    peer_quantizer,
    random_quantizer,
    squared_errors,
)
from torch import Tensor

from espnet2_spear.fileio.explain import add_options, option_parser
from espnet2_spear.fileio.tables import markdown_table
from espnet2_spear.mvq.embedding_set import EmbeddingSet
from espnet2_spear.mvq.files import load_quantizer
from espnet2_spear.mvq.quantizer import Quantizer


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = option_parser(__doc__)
    parser.add_argument(
        "--peer",
        default="",
        metavar="FOLDER",
        help="where multi-quantization is installed; empty for the environment, "
        "none to measure ours alone",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--num_threads", type=int, default=2)
    parser.add_argument("--trials", type=int, default=5, help="of each, alternating")
    group = parser.add_argument_group("encoding")
    add_options(group, dim=1024, num_codebooks=16, codebook_size=256, refine_iters=5)
    group.add_argument("--quantizer", help="file of a trained one instead")
    group.add_argument(
        "--embeddings", help="folder of spear_embed: measure on its held-out frames"
    )
    group.add_argument("--frames", type=int, default=2048, help="a trial of ours")
    group.add_argument("--peer_frames", type=int, default=48, help="of the library")
    group.add_argument("--max_frames", type=int, help="ours: computed at once")
    group.add_argument(
        "--memory_frames",
        type=int,
        default=60_000,
        help="length of the utterance that the memory is measured on; 0 for none "
        "(60000 are 20 minutes at 50 Hz)",
    )
    group.add_argument(
        "--passes",
        action="store_true",
        help="error and time against passes and extra passes instead, ours alone",
    )
    group = parser.add_argument_group("codes of many sizes")
    group.add_argument(
        "--grid",
        action="store_true",
        help="compare the codes of random quantizers of 32 sizes instead",
    )
    group.add_argument("--grid_frames", type=int, default=8, help="of each size")
    group.add_argument(
        "--crowded",
        action="store_true",
        help="centres that share 2 N dimensions, so that the search is hard",
    )
    group = parser.add_argument_group("training")
    group.add_argument(
        "--train",
        action="store_true",
        help="train both on --embeddings and compare the results instead",
    )
    group.add_argument("--iters", type=int, default=1000, help="steps of each phase")
    add_options(group, batch_frames=1024, lr=0.005, seed=0)
    group.add_argument(
        "--eval_frames", type=int, default=1000, help="held-out frames to measure on"
    )
    return parser


@torch.no_grad()
def peak_of_long_utterance(
    folder: Path, frames: int, options: dict, threads: int
) -> tuple[float, float]:
    """Peak resident memory in MB before and after encoding; in a fresh process."""
    torch.set_num_threads(threads)
    quantizer = load_quantizer(folder / "quantizer.pt")
    x = np.memmap(folder / "x.f16", np.float16, "c", shape=(frames, quantizer.dim))
    x = torch.from_numpy(x)
    quantizer.encode(x[:1], **options)  # its tables
    before = read_peak(x.device)
    quantizer.encode(x, **options)
    return before / MIB, read_peak(x.device) / MIB


def measure_memory(quantizer: Quantizer, x: Tensor, args, options: dict) -> str:
    """Line on the memory that a very long utterance takes."""
    length = args.memory_frames
    if x.device.type == "cuda":
        reset_peak(x.device)
        long = x[torch.arange(length, device=x.device) % len(x)].half()
        held = torch.cuda.memory_allocated(x.device) / MIB
        quantizer.encode(long, **options)
        return (
            f"memory, {length} frames at once: peak {read_peak(x.device) / MIB:.0f} MB "
            f"on the GPU, of it {held:.0f} MB quantizer and input"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quantizer.save(folder / "quantizer.pt")
        with open(folder / "x.f16", "wb") as stream:
            part = x.half().numpy()
            for start in range(0, length, len(part)):
                part[: length - start].tofile(stream)
        before, after = fresh(
            peak_of_long_utterance, folder, length, options, args.num_threads
        )
    return (
        f"memory, {length} frames at once: peak resident {after:.0f} MB, of it "
        f"{before:.0f} MB Python, torch, the quantizer and its tables; the input "
        f"(memory-mapped, {length * quantizer.dim * 2 / MIB:.0f} MB) is counted"
    )


@torch.no_grad()
def passes_taken(quantizer: Quantizer, x: Tensor, passes: int) -> float:
    """Passes that a frame takes part in, on average, by the codes after each."""
    active = torch.ones(len(x), dtype=torch.bool, device=x.device)
    taken, before = 0.0, quantizer.encode(x, 0)
    for number in range(1, passes + 1):
        taken += float(active.float().mean())
        after = quantizer.encode(x, number)
        active &= (after != before).any(dim=1)
        before = after
    return taken


@torch.no_grad()
def compare_codes(quantizer: Quantizer, x: Tensor, ours: Tensor, peer: Tensor) -> str:
    """Line on how far two results agree."""
    mine, theirs = (
        squared_errors(quantizer, x, ours),
        squared_errors(quantizer, x, peer),
    )
    worst = float(((mine - theirs) / theirs.clamp(min=1e-12)).max())
    same = ours == peer
    return (
        f"codes of {len(x)} frames: {float(same.float().mean()):.4%} of the codes and "
        f"{float(same.all(dim=1).float().mean()):.2%} of the frames "
        f"are equal; our squared error is larger by at most {worst:.1e} (relative)"
    )


def encoding(args: argparse.Namespace) -> None:
    """Measure encoding."""
    device = torch.device(args.device)
    if args.quantizer:
        quantizer = load_quantizer(args.quantizer)
    else:
        quantizer = random_quantizer(
            args.dim, args.codebook_size, args.num_codebooks, args.seed
        )
    if args.embeddings:
        x = EmbeddingSet(args.embeddings).held_out_frames(args.frames)
        x = x[torch.arange(args.frames) % len(x)]
    else:
        x = noisy_vectors(quantizer, args.frames, args.seed + 1)
    quantizer, x = quantizer.to(device), x.to(device)
    if args.passes:
        return compare_passes(args, quantizer, x)
    options = {"refine_iters": args.refine_iters}
    if args.max_frames:
        options["max_frames"] = args.max_frames
    peer = load_peer(args.peer)
    work = {"ours": (len(x), lambda: quantizer.encode(x, **options))}
    if peer is not None:
        other = peer_quantizer(peer, quantizer)
        few = quantizer.standardise(x[: args.peer_frames])
        work["library"] = (
            len(few),
            lambda: peer_codes(other, few, args.refine_iters, args.peer_frames),
        )
    times = in_turn({n: call for n, (_, call) in work.items()}, args.trials, device)
    rates = {n: [work[n][0] / t for t in values] for n, values in times.items()}
    print(
        f"D={quantizer.dim}, N={quantizer.num_codebooks}, K={quantizer.codebook_size}, "
        f"{args.refine_iters} passes, {device}"
        + (f", {args.num_threads} threads" if device.type == "cpu" else "")
        + f", {args.trials} alternating trials\n"
    )
    rows = [
        [name, str(work[name][0]), f"{statistics.median(values):,.1f}"]
        + [f"{min(values):,.1f}", f"{max(values):,.1f}"]
        for name, values in rates.items()
    ]
    head = ["", "frames a trial", "frames/s, median", "min", "max"]
    print(markdown_table(head, rows))
    rate = statistics.median(rates["ours"])
    if peer is not None:
        pairs = zip(rates["ours"], rates["library"], strict=True)
        ratios = [a / b for a, b in pairs]
        print(
            f"\nratio: {statistics.median(ratios):.1f} (median of the trials; "
            f"{min(ratios):.1f} to {max(ratios):.1f})"
        )
        ours, theirs = (call() for _, call in work.values())
        count = len(theirs)
        print(compare_codes(quantizer, x[:count], ours[:count], theirs))
    taken = passes_taken(quantizer, x, args.refine_iters)
    print(
        f"a frame is searched in {taken:.2f} of {args.refine_iters} passes; it has "
        "reached its fixed point after that"
    )
    # Logits, and inner products with all centres.
    entries = quantizer.num_codebooks * quantizer.codebook_size
    bound = product_rate(device) / (4 * quantizer.dim * entries)
    print(
        f"bound by its two matrix products, measured here: {bound:,.0f} frames/s; "
        f"reached {rate / bound:.0%}"
    )
    if args.memory_frames:
        print(measure_memory(quantizer, x, args, options))


def main(cmd=None):
    """Measure; see ``--help`` and benchmarks/README.md."""
    args = get_parser().parse_args(cmd)
    torch.set_num_threads(args.num_threads)
    if args.grid:
        return compare_grid(args)
    if not args.train:
        return encoding(args)
    if not args.embeddings:
        raise SystemExit("--train needs --embeddings, a folder of spear_embed")
    if args.iters % 4:
        # The library halves its learning rate where step % (iters / 4) is 0.
        raise SystemExit(f"--iters {args.iters}: give a multiple of 4")
    from mvq_training import compare_training

    compare_training(args)


if __name__ == "__main__":
    main()

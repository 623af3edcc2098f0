"""Codes of our search: beside the library's (mvq.py --grid), and of more passes.

Where the codes of a frame differ, the same search in float64 says who rounded where two
candidates nearly tie.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import torch
from peer import (
    load_peer,
    noisy_vectors,
    peer_codes,
    peer_quantizer,
    random_quantizer,
    squared_errors,
)
from torch import Tensor

from espnet2_spear.mvq.quantizer import Quantizer
from espnet2_spear.mvq.report import relative_error
from espnet2_spear.mvq.search import GramTables, refine

DIMS, NUMS, SIZES = (384, 512, 1024, 1536), (4, 8, 16, 32), (16, 256)
DEFAULT = (5, 0)
OPTIONS = (DEFAULT, (20, 0), (5, 1), (5, 2), (5, 5), (5, 10))
ALLOWED = 1e-5  # by which our squared error may be larger, relative
HEAD = (
    "| D | N | K | frames with other codes | of them as in float64: ours | the "
    "library's | largest excess of our squared error | largest gain |\n"
    "|--:|--:|--:|--:|--:|--:|--:|--:|"
)


@torch.no_grad()
def crowded_quantizer(dim: int, size: int, num: int, seed: int) -> Quantizer:
    """A random quantizer whose centres share 2 N dimensions.

    So they depend on each other, and the search is as hard as for a trained one. In
    all dimensions random centres are nearly orthogonal, and any search finds the best.
    """
    quantizer = random_quantizer(dim, size, num, seed)
    basis, _ = torch.linalg.qr(torch.randn(dim, min(dim, 2 * num)))
    for x in (quantizer.centers, quantizer.to_logits.weight):
        x.copy_(x @ basis @ basis.T * (dim / basis.size(1)) ** 0.5)
    quantizer.stamp()
    return quantizer.eval()


@torch.no_grad()
def exact_codes(quantizer: Quantizer, x: Tensor, passes: int) -> Tensor:
    """Codes (B, N) of x (B, D) by the search in float64, from the same start."""
    tables = GramTables(quantizer.scaled_centers().double())
    linear = tables.linear_terms(quantizer.standardise(x).double())
    return refine(tables, linear, quantizer.encode(x, 0), passes)


def compare_grid(args: argparse.Namespace) -> None:
    """Print a row a size.

    Raises:
        SystemExit: a frame whose squared error is larger than allowed although the
            library's codes are not a matter of rounding.
    """
    peer = load_peer(args.peer)
    if peer is None:
        raise SystemExit("--grid compares with the library: give --peer")
    print(f"{args.grid_frames} frames each, {args.refine_iters} passes\n\n{HEAD}")
    frames, others, wrong = 0, 0, 0
    for i, (dim, num, size) in enumerate(itertools.product(DIMS, NUMS, SIZES)):
        make = crowded_quantizer if args.crowded else random_quantizer
        quantizer = make(dim, size, num, args.seed + i)
        x = noisy_vectors(quantizer, args.grid_frames, args.seed + i)
        ours = quantizer.encode(x, args.refine_iters)
        standard = quantizer.standardise(x)
        library = peer_quantizer(peer, quantizer)
        theirs = peer_codes(library, standard, args.refine_iters, len(x))
        errors = [squared_errors(quantizer, x, codes) for codes in (ours, theirs)]
        excess = (errors[0] - errors[1]) / errors[1]
        which = (ours != theirs).any(dim=1).nonzero().squeeze(1)
        as_exact = [0, 0]
        if len(which):
            exact = exact_codes(quantizer, x[which], args.refine_iters)
            same = [(codes[which] == exact).all(dim=1) for codes in (ours, theirs)]
            as_exact = [int(s.sum()) for s in same]
            wrong += int((~same[0] & (excess[which] > ALLOWED)).sum())
        print(
            f"| {dim} | {num} | {size} | {len(which)} of {len(x)} | {as_exact[0]} "
            f"| {as_exact[1]} | {max(0.0, float(excess.max())):.1e} "
            f"| {max(0.0, float(-excess.min())):.1e} |",
            flush=True,
        )
        frames, others = frames + len(x), others + len(which)
    print(f"\n{frames} frames, {others} with other codes than the library's")
    if wrong:
        raise SystemExit(
            f"{wrong} of them are neither those of float64 nor within {ALLOWED:.0e}"
        )


@torch.no_grad()
def compare_passes(args: argparse.Namespace, quantizer: Quantizer, x: Tensor) -> None:
    """Print a row for each number of passes and of extra passes."""
    seconds: dict[tuple[int, int], list[float]] = {o: [] for o in OPTIONS}
    codes = {}
    for trial in range(args.trials + 1):
        for option in OPTIONS:
            start = time.process_time()
            codes[option] = quantizer.encode(x, option[0], args.max_frames, option[1])
            if trial:  # the first one does not count
                seconds[option].append(time.process_time() - start)
    usual = squared_errors(quantizer, x, codes[DEFAULT])
    standard = quantizer.standardise(x)
    print(
        f"D={quantizer.dim}, N={quantizer.num_codebooks}, {len(x)} frames, "
        f"{args.trials} alternating trials\n\n"
        "| passes | extra passes | relative error | frames better than with "
        f"{DEFAULT[0]} passes | worse | time of a core, relative |\n"
        "|--:|--:|--:|--:|--:|--:|"
    )
    for option in OPTIONS:
        change = squared_errors(quantizer, x, codes[option]) / usual - 1
        better, worse = (
            float(c.float().mean()) for c in (change < -1e-5, change > 1e-5)
        )
        pairs = zip(seconds[option], seconds[DEFAULT], strict=True)
        print(
            f"| {option[0]} | {option[1]} "
            f"| {relative_error(standard, quantizer.sum_centers(codes[option])):.4f} "
            f"| {100 * better:.1f} % | {100 * worse:.1f} % "
            f"| {statistics.median(a / b for a, b in pairs):.2f} |"
        )

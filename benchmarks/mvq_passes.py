"""Error and time of the search against its passes (mvq.py --passes)."""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from peer import squared_errors
from torch import Tensor

from espnet2_spear.mvq.quantizer import Quantizer
from espnet2_spear.mvq.report import relative_error

DEFAULT = (5, 0)
OPTIONS = (DEFAULT, (20, 0), (5, 1), (5, 2), (5, 5), (5, 10))


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

"""Bytes and operations of encoding a frame, and what a device can do of them.

They are those of the search as operations on tensors. The compiled one of CPUs makes
the same operations, but keeps most of what it reads and writes in caches.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from espnet2_spear.mvq.quantizer import Quantizer
from espnet2_spear.mvq.search import num_kept

FLOAT, INDEX = 4, 8


class Cost(NamedTuple):
    """Of one frame, on average.

    Attributes:
        matmul: floating-point operations of the matrix products.
        other: of everything else, an estimate.
        bytes: read and written if every operation reads its inputs from memory and
            writes its results to it; caches save a part of them.
    """

    matmul: float
    other: float
    bytes: float


class Activity(NamedTuple):
    """What a set of frames did in the search.

    Attributes:
        passes: passes that a frame took part in, on average.
        moves: codes that changed in a pass after which another one came, summed over
            the passes, on average.
    """

    passes: float
    moves: float


@torch.no_grad()
def measure_activity(quantizer: Quantizer, x: Tensor, passes: int) -> Activity:
    """Count passes and changed codes, from the codes after 0, 1, ... passes."""
    active = torch.ones(len(x), dtype=torch.bool, device=x.device)
    taken, moves = 0.0, 0.0
    before = quantizer.encode(x, 0)
    for i in range(1, passes + 1):
        taken += float(active.float().mean())
        after = quantizer.encode(x, i)
        moved = after != before
        if i < passes:
            moves += float(moved.sum(dim=1).float().mean())
        active &= moved.any(dim=1)
        before = after
    return Activity(taken, moves)


def frame_cost(dim: int, size: int, num: int, activity: Activity, chunk: int) -> Cost:
    """Add up the operations of the encoder.

    Args:
        dim, size, num: D, K, N.
        activity: passes and changes.
        chunk: frames computed at once; they share the reading of the weights.
    """
    entries = num * size
    matmul = 2 * 2 * dim * entries  # logits, linear terms
    moved = 2 * (2 * dim * entries / chunk + dim + entries) * FLOAT
    moved += entries * FLOAT + num * INDEX  # argmax
    # Scores of the first pass: N rows of the products and the linear terms.
    other = num * entries + 2 * entries
    moved += (num * entries + 4 * entries) * FLOAT
    pass_other, pass_bytes = _pass_cost(size, num)
    other += activity.passes * pass_other
    moved += activity.passes * pass_bytes
    # A changed code adds one row of products to the scores and subtracts another.
    other += activity.moves * 4 * entries
    moved += activity.moves * 2 * entries * FLOAT
    moved += (activity.passes - 1) * 3 * entries * FLOAT
    return Cost(matmul, other, moved)


def _pass_cost(size: int, num: int) -> tuple[float, float]:
    """Operations and bytes of one pass, without centres that happen to be unused."""
    entries = num * size
    kept = min(num_kept(1, size) if num > 1 else 1, size)
    other, moved = float(entries), (entries + 2 * num * kept) * FLOAT
    groups, joined, span = num, 1, kept + 1
    while groups > 1:
        groups //= 2
        block = groups * span * span
        moved += block * (FLOAT + 2 * FLOAT) + block * FLOAT  # gather by int32
        if joined > 1:  # sums over the codebooks on both sides
            rows = groups * (kept + 1) * joined * (span + kept + 1)
            moved += rows * FLOAT
            other += rows
        pairs = groups * kept * kept
        other += 4 * pairs
        moved += 4 * pairs * FLOAT
        joined *= 2
        kept = min(num_kept(joined, size) if groups > 1 else 1, kept * kept)
        moved += groups * kept * (2 * FLOAT + (joined + 1) * INDEX)
        span = min(2 * span, joined * kept + joined)
    return other, moved


def device_peaks(device: torch.device) -> tuple[float, float]:
    """Measure what the device does: float32 FLOP/s of a product, bytes/s of a copy."""
    cuda = device.type == "cuda"
    side, length = (8192, 2**28) if cuda else (2048, 2**25)
    a = torch.randn(side, side, device=device)
    b = torch.empty(length, device=device)
    c = torch.zeros(length, device=device)
    product = best_seconds(lambda: a @ a, device, 5)
    copy = best_seconds(lambda: b.copy_(c), device, 5)
    return 2 * side**3 / product, 2 * FLOAT * length / copy


def best_seconds(work, device: torch.device, trials: int) -> float:
    """Shortest of some trials, after one that does not count."""
    seconds = []
    for _ in range(trials + 1):
        seconds.append(timed(work, device)[0])
    return min(seconds[1:])


def timed(work, device: torch.device):
    """Seconds that work() took, and what it returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def report(cost: Cost, rate: float, device: torch.device) -> str:
    """Lines that compare the rate (frames/s) with the device's limits."""
    flops, bandwidth = device_peaks(device)
    bounds = {
        "matrix products": flops / cost.matmul,
        "memory, nothing cached": bandwidth / cost.bytes,
    }
    lines = [
        f"per frame: {cost.matmul / 1e6:.2f} M operations in matrix products, "
        f"{cost.other / 1e6:.2f} M others, {cost.bytes / 1e6:.2f} MB read and written",
        f"this device, measured: {flops / 1e12:.2f} TFLOP/s (float32), "
        f"{bandwidth / 1e9:.0f} GB/s (copy)",
    ]
    lines += [
        f"bound by {name}: {bound:,.0f} frames/s; reached {rate / bound:.0%}"
        for name, bound in bounds.items()
    ]
    return "\n".join(lines)

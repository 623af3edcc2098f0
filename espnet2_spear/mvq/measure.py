"""Figures of a quantizer: errors, usage of codes, what each codebook contributes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from espnet2_spear.mvq.abs_quantizer import AbsQuantizer
from espnet2_spear.mvq.embeddings import TrainingFrames
from espnet2_spear.mvq.losses import code_usage, entropy

EVALUATED_FRAMES = 5_000
CHUNK = 256
MORE_PASSES = (10, 20)  # beside all up to the quantizer's own number


def evaluate(
    quantizer: AbsQuantizer,
    data: TrainingFrames,
    seed: int = 0,
    refine_iters: int | None = None,
) -> dict[str, Any]:
    """Measure a quantizer on held-out frames and on as many training frames.

    Args:
        quantizer: in eval mode.
        data: embeddings.
        seed: of the choice of training frames.
        refine_iters: passes of the search; the quantizer's own number for None.

    Returns:
        primitives only: ``identity``, ``kind``, sizes, ``frame_rate`` (Hz, may be
        None), and for each of ``train`` and ``held_out`` the number of ``frames``,
        ``relative_error`` (see :func:`relative_error`, standardised if the quantizer
        is), and per codebook ``entropy_bits`` and ``dead`` (entries that none of these
        frames uses); for ``held_out`` also ``passes`` ([passes, error] pairs),
        ``codebooks`` (:meth:`Contributions.greedy`) and ``correlation`` (N, N).
    """
    device = quantizer.mean.device
    passes = quantizer.passes(refine_iters)
    summary: dict[str, Any] = {
        "identity": quantizer.identity,
        "kind": quantizer.kind,
        "dim": quantizer.dim,
        "num_codebooks": quantizer.num_codebooks,
        "codebook_size": quantizer.codebook_size,
        "refine_iters": passes,
        "frame_rate": data.index.get("frame_rate"),
    }
    frames = data.train_sample(EVALUATED_FRAMES, seed).to(device)
    codes = quantizer.encode(frames, passes)
    summary["train"] = _basic(quantizer, quantizer.standardise(frames), codes)
    frames = data.held_out_frames(EVALUATED_FRAMES).to(device)
    codes = quantizer.encode(frames, passes)
    x = quantizer.standardise(frames)
    parts = contributions(quantizer, x, codes)
    summary["held_out"] = {
        **_basic(quantizer, x, codes),
        "passes": _error_by_passes(quantizer, frames),
        "codebooks": parts.greedy(),
        "correlation": parts.correlation().tolist(),
    }
    return summary


@torch.no_grad()
def _basic(quantizer: AbsQuantizer, x: Tensor, codes: Tensor) -> dict[str, Any]:
    usage = code_usage(codes, quantizer.codebook_size)
    return {
        "frames": len(x),
        "relative_error": relative_error(x, quantizer.sum_centers(codes)),
        "entropy_bits": code_entropy_bits(usage).tolist(),
        "dead": (usage == 0).sum(dim=1).tolist(),
    }


@torch.no_grad()
def _error_by_passes(
    quantizer: AbsQuantizer, frames: Tensor
) -> list[tuple[int, float]]:
    own = quantizer.default_refine_iters
    counts = [*range(own + 1), *(MORE_PASSES if own else ())]
    x = quantizer.standardise(frames)
    return [
        (
            passes,
            relative_error(x, quantizer.sum_centers(quantizer.encode(frames, passes))),
        )
        for passes in counts
    ]


def relative_error(x: Tensor, approximation: Tensor) -> float:
    """Squared error relative to that of the mean of x; both (B, D)."""
    spread = (x - x.mean(dim=0)).square().sum()
    return float((approximation - x).square().sum() / spread)


def code_entropy_bits(usage: Tensor) -> Tensor:
    """Entropy (N,) in bits of how often codes occur, counts (N, K)."""
    probs = usage / usage.sum(dim=1, keepdim=True)
    return entropy(probs) / torch.log(torch.tensor(2.0))


class Contributions(NamedTuple):
    """Inner products of what each codebook contributes to a sum, its mean removed.

    Attributes:
        spread: squared length of the vectors themselves, their mean removed.
        with_x: (N,) products with the vectors.
        gram: (N, N) products with each other. All are sums over vectors, float64.
    """

    spread: float
    with_x: Tensor
    gram: Tensor

    def error(self, used: list[int]) -> float:
        """Relative error if only some codebooks are used, the others by their mean."""
        if not used:
            return 1.0
        gram = self.gram[used][:, used].sum()
        return 1.0 + float(gram - 2 * self.with_x[used].sum()) / self.spread

    def greedy(self) -> list[tuple[int, float]]:
        """[codebook, error] as one more codebook is used, the best next one each time.

        The error is up to the mean of the vectors, which the sums need not hit.
        """
        left, used, result = list(range(len(self.with_x))), [], []
        while left:
            best = min(left, key=lambda n: self.error([*used, n]))
            left.remove(best)
            used.append(best)
            result.append((best, self.error(used)))
        return result

    def correlation(self) -> Tensor:
        """Correlation (N, N) of contributions; 0 for a codebook that has only one."""
        length = self.gram.diagonal().sqrt()
        return self.gram / (length[:, None] * length).clamp(min=1e-30)


@torch.no_grad()
def contributions(quantizer: AbsQuantizer, x: Tensor, codes: Tensor) -> Contributions:
    """Measure what codebooks contribute.

    Args:
        quantizer: any.
        x: standardised vectors (B, D).
        codes: theirs, (B, N).
    """
    centers = quantizer.scaled_centers()
    usage = code_usage(codes, quantizer.codebook_size) / len(codes)
    centers = centers - torch.einsum("nk,nkd->nd", usage, centers).unsqueeze(1)
    x = x - x.mean(dim=0)
    number = torch.arange(quantizer.num_codebooks, device=x.device)
    with_x = x.new_zeros(len(number), dtype=torch.float64)
    gram = x.new_zeros(len(number), len(number), dtype=torch.float64)
    for part, part_codes in zip(x.split(CHUNK), codes.split(CHUNK), strict=True):
        chosen = centers[number, part_codes]  # (b, N, D)
        with_x += torch.einsum("bnd,bd->n", chosen, part)
        gram += torch.einsum("bnd,bmd->nm", chosen, chosen)
    return Contributions(float(x.double().square().sum()), with_x.cpu(), gram.cpu())

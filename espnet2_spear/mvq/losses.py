"""Losses that train a quantizer."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from espnet2_spear.mvq.gram import GramTables
from espnet2_spear.mvq.quantizer import Quantizer
from espnet2_spear.mvq.refine import refine

LOGITS_ENTROPY_WEIGHT = 0.01


class QuantizerLosses(NamedTuple):
    """Losses of a batch, scalars.

    Attributes:
        reconstruction: squared error relative to that of the mean of all sums of
            centres; 0 is perfect.
        logprob: mean negative log-probability of the refined codes; it alone trains
            the logits to start the search well.
        logits_entropy: 0 if the batch's mean distribution over codes is uniform, 1 if
            it is a single code.
        index_entropy: the same of the codes themselves, without a gradient.
    """

    reconstruction: Tensor
    logprob: Tensor
    logits_entropy: Tensor
    index_entropy: Tensor

    def total(self) -> Tensor:
        """What is minimised."""
        return (
            self.reconstruction
            + self.logprob
            + LOGITS_ENTROPY_WEIGHT * self.logits_entropy
        )


def quantizer_losses(
    quantizer: Quantizer,
    x: Tensor,
    refine_iters: int,
    tables: GramTables | None = None,
) -> QuantizerLosses:
    """Compute the losses of a batch; the choice of codes carries no gradient.

    Args:
        quantizer: to train.
        x: standardised vectors (B, D).
        refine_iters: passes of the search for the codes.
        tables: of the centres to search with; by default the present ones.

    Returns:
        float32 scalars, under autocast, too: the search subtracts large inner products.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _losses(quantizer, x.float(), refine_iters, tables)


def _losses(
    quantizer: Quantizer, x: Tensor, refine_iters: int, tables: GramTables | None
) -> QuantizerLosses:
    logits = quantizer.logits(x)
    with torch.no_grad():
        codes = logits.argmax(dim=-1)
        if refine_iters > 0:
            tables = tables or quantizer.tables()
            codes = refine(tables, tables.linear_terms(x), codes, refine_iters)
        mean = quantizer.scaled_centers().mean(dim=1).sum(dim=0)
        spread = (x - mean).square().sum() + 1e-20
    reconstruction = (quantizer.sum_centers(codes) - x).square().sum() / spread
    size = quantizer.codebook_size
    log_probs = logits.log_softmax(dim=-1)
    logprob = F.nll_loss(log_probs.flatten(0, 1), codes.flatten())
    usage = code_usage(codes, size) / len(codes)
    return QuantizerLosses(
        reconstruction,
        logprob,
        _entropy_gap(log_probs.exp().mean(dim=0)),
        _entropy_gap(usage),
    )


def code_usage(codes: Tensor, codebook_size: int) -> Tensor:
    """How often every code occurs.

    Args:
        codes: (B, N) int64.
        codebook_size: K.

    Returns:
        float32 (N, K).
    """
    num = codes.shape[1]
    first = torch.arange(num, device=codes.device) * codebook_size
    counts = torch.bincount((codes + first).flatten(), minlength=num * codebook_size)
    return counts.view(num, codebook_size).float()


def entropy(probs: Tensor) -> Tensor:
    """Entropy of distributions (..., K) in nats."""
    return -torch.special.xlogy(probs, probs).sum(dim=-1)


def _entropy_gap(probs: Tensor) -> Tensor:
    full = math.log(probs.shape[-1])
    return (full - entropy(probs).mean()) / full

"""Further passes of the joint search, which can only make the error smaller.

A pass of :mod:`.refine` joins fixed pairs of codebooks, so it ends where no change of
such a pair, and of pairs of pairs, helps. Here every pass pairs the codebooks anew, and
a vector takes new codes only if they are better. The codes are no longer those of the
multi-quantization library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from espnet2_spear.mvq.gram import GramTables
from espnet2_spear.mvq.refine import refine

# Share of the explained energy by which the error must fall: what lies below may be
# rounding.
MARGIN = 1e-6


def improve(tables: GramTables, linear: Tensor, codes: Tensor, passes: int) -> Tensor:
    """Look for better codes.

    Args:
        tables: inner products of the centres.
        linear: (B, N*K) from :meth:`GramTables.linear_terms`.
        codes: (B, N) int64 to start from.
        passes: their number. The pairings of each are the same in every call.

    Returns:
        (B, N) int64, of squared errors that are nowhere larger.
    """
    error = _error(tables, linear, codes)
    generator = torch.Generator().manual_seed(0)
    for _ in range(passes):
        order = torch.randperm(tables.num_codebooks, generator=generator)
        new = refine(tables, linear, codes, 1, order.to(codes.device))
        new_error = _error(tables, linear, new)
        better = new_error < error - MARGIN * error.abs()
        codes = torch.where(better.unsqueeze(1), new, codes)
        error = torch.where(better, new_error, error)
    return codes


def _error(tables: GramTables, linear: Tensor, codes: Tensor) -> Tensor:
    """Squared error (B,) of chosen centres, less that of choosing none, float64."""
    first = torch.arange(tables.num_codebooks, device=codes.device)
    rows = codes + first * tables.codebook_size
    products = tables.products[rows.unsqueeze(2), rows.unsqueeze(1)]
    return linear.gather(1, rows).double().sum(1) + products.double().sum((1, 2))

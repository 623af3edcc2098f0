"""Joint search of the codes of vectors: compiled on a CPU, by tensors on a GPU.

Both forms take the same candidates and prune them alike, so they find the same codes
but for ties within rounding (:mod:`.refine_cpu`, :mod:`.refine_tensors`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from espnet2_spear.mvq.gram import GramTables, kept_per_level
from espnet2_spear.mvq.refine_tensors import refine_tensors


def refine(
    tables: GramTables,
    linear: Tensor,
    codes: Tensor,
    iters: int,
    order: Tensor | None = None,
) -> Tensor:
    """Run refinement passes.

    Args:
        tables: inner products of the centres.
        linear: (B, N*K) from :meth:`GramTables.linear_terms`.
        codes: (B, N) int64 to start from.
        iters: number of passes.
        order: (N,) codebooks in the order in which they are paired; their own for
            None.

    Returns:
        (B, N) int64.
    """
    if iters == 0:
        return codes
    if order is None:
        order = torch.arange(tables.num_codebooks, device=codes.device)
    first = order * tables.codebook_size
    rows = codes[:, order] + first  # of the tables
    search = _refine_compiled if codes.device.type == "cpu" else refine_tensors
    rows = search(tables, linear, rows, iters, order)
    result = torch.empty_like(codes)
    result[:, order] = rows - first
    return result


def _refine_compiled(
    tables: GramTables, linear: Tensor, rows: Tensor, iters: int, order: Tensor
) -> Tensor:
    """As :func:`refine_tensors`, on the CPU."""
    from espnet2_spear.mvq.refine_cpu import run_passes  # numba: slow to import

    kept = kept_per_level(tables.num_codebooks, tables.codebook_size)
    rows = rows.contiguous()
    run_passes(
        tables.products.detach().numpy(),
        linear.detach().numpy(),
        rows.numpy(),
        order.numpy(),
        np.array(kept),
        iters,
        torch.get_num_threads(),
    )
    return rows

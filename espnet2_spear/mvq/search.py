"""Joint search of the codes of vectors, [3.2] of docs/method.md.

With e = sum_n c[n, i_n] - x, the error of the present codes, and d, the change that a
candidate makes, a pass of the search of multi-quantization scores

    S[n, k] = ||e + d[n, k]||^2,     d[n, k] = c[n, k] - c[n, i_n]    one codebook
    S_ab    = S_a + S_b - ||e||^2 + 2 d_a.d_b                         two groups joined

keeps the best candidates of every codebook, joins neighbouring groups (0 with 1, 2 with
3, ...) and keeps the best pairs, until one group is left, whose best candidate is the
new choice.

These scores depend on x only through its products with all centres, and on the centres
only through their products with each other (:class:`GramTables`). With both tables at
hand the search never touches the vectors themselves, whose dimension is large.

:func:`refine` makes such passes: compiled and vector by vector on a CPU
(:mod:`.search_cpu`), by operations on tensors elsewhere (:func:`refine_tensors`). Both
take the same candidates and prune them alike, so they find the same codes but for ties
within rounding. :func:`improve` goes on with other pairs of codebooks; the codes are
then no longer the library's.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MAX_KEPT = 128


class GramTables:
    """Inner products of the centres of all codebooks.

    Args:
        centers: (N, K, D) of N codebooks with K centres each.
        centred: move the mean centre of every codebook into ``shift``: a joint search
            finds the same codes, and float32 rounding acts on smaller numbers.
    """

    def __init__(self, centers: Tensor, centred: bool = True) -> None:
        self.num_codebooks, self.codebook_size, dim = centers.shape
        means = centers.mean(dim=1, keepdim=True) * centred
        self.shift = means.sum(dim=(0, 1))  # (D,)
        self.centers = (centers - means).reshape(-1, dim)  # (N*K, D)
        self.norms = self.centers.square().sum(dim=1)  # (N*K,)

    @cached_property
    def products(self) -> Tensor:
        """Inner products (N*K, N*K) of all centres, 0 within a codebook."""
        products = self.centers @ self.centers.T
        # Products within a codebook never occur: one of its centres is in use.
        size = self.codebook_size
        for start in range(0, len(products), size):
            products[start : start + size, start : start + size] = 0
        return products

    def linear_terms(self, x: Tensor) -> Tensor:
        """Part of the squared error that is a sum over the codebooks' choices.

        Args:
            x: (B, D).

        Returns:
            (B, N*K): c.c - 2 x.c for every centre c.
        """
        return torch.addmm(
            self.norms.unsqueeze(0), x - self.shift, self.centers.T, alpha=-2
        )


def num_kept(num_joined: int, codebook_size: int) -> int:
    """Candidates kept for a group of codebooks that is searched jointly.

    Args:
        num_joined: codebooks in the group.
        codebook_size: centres per codebook.

    Returns:
        16 (8 for codebooks of at most 16), doubled for every factor 4 in
        ``num_joined``, at most 128.
    """
    kept = 16 if codebook_size > 16 else 8
    while num_joined >= 4:
        num_joined //= 4
        kept *= 2
    return min(kept, MAX_KEPT)


def kept_per_level(num_codebooks: int, codebook_size: int) -> list[int]:
    """Candidates kept for groups of 1, 2, 4... codebooks, up to the only one."""
    kept: list[int] = []
    joined = 1
    while joined <= num_codebooks:
        possible = kept[-1] ** 2 if kept else codebook_size
        wanted = num_kept(joined, codebook_size) if joined < num_codebooks else 1
        kept.append(min(wanted, possible))
        joined *= 2
    return kept


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
    from espnet2_spear.mvq.search_cpu import run_passes  # numba: slow to import

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


def refine_tensors(
    tables: GramTables, linear: Tensor, rows: Tensor, iters: int, order: Tensor
) -> Tensor:
    """Refine all vectors at once, by operations on tensors of any device.

    Args:
        tables: inner products of the centres.
        linear: (B, N*K).
        rows: (B, N) rows of the tables, in the order in which codebooks are paired.
        iters: number of passes.
        order: (N,) that order.

    Returns:
        (B, N) rows of the tables.
    """
    scores = initial_scores(tables, linear, rows)
    active = torch.arange(len(rows), device=rows.device)
    result, old = rows.clone(), rows
    for i in range(iters):
        new = refine_once(tables, scores, old, order)
        result[active] = new
        # A pass depends on nothing but the codes it starts from, so a vector whose
        # codes stay is finished.
        moved = new != old
        going = moved.any(dim=1).nonzero().squeeze(1)
        if i == iters - 1 or len(going) == 0:
            break
        if len(going) < len(active):
            active, scores = active[going], scores[going]
            old, new, moved = old[going], new[going], moved[going]
        update_scores(tables, scores, old, new, moved)
        old = new
    return result


def initial_scores(tables: GramTables, linear: Tensor, rows: Tensor) -> Tensor:
    """Scores (B, N*K) of all centres as candidates of their codebook.

    A centre's linear term and its products with the present centres of the other
    codebooks.

    Args:
        tables: inner products of the centres.
        linear: (B, N*K) from :meth:`GramTables.linear_terms`.
        rows: (B, N) present centres, rows of the tables.
    """
    products = F.embedding_bag(rows, tables.products, mode="sum")
    return torch.add(linear, products, alpha=2)


def update_scores(
    tables: GramTables, scores: Tensor, old: Tensor, new: Tensor, moved: Tensor
) -> None:
    """Change scores (B, N*K) in place for codes that moved from old to new."""
    count = moved.sum(dim=1)
    rows = torch.stack([new[moved], old[moved]], dim=1).flatten()
    weights = scores.new_tensor([2.0, -2.0]).repeat(len(rows) // 2)
    scores += F.embedding_bag(
        rows,
        tables.products,
        2 * (count.cumsum(0) - count),
        mode="sum",
        per_sample_weights=weights,
    )


def refine_once(
    tables: GramTables, scores: Tensor, current: Tensor, order: Tensor
) -> Tensor:
    """One pass: candidates per codebook, joined pair by pair into one group.

    With e the error of the present codes, the score of a candidate of some group of
    codebooks is the squared error ||e + d||^2 after the group alone changes by d, up
    to a constant. Joining two groups adds 2 d_a.d_b.

    Args:
        tables: inner products of the centres.
        scores: (B, N*K) from :func:`initial_scores`.
        current: (B, N) present centres, rows of the tables.
        order: (N,) codebooks in the order in which they are paired, which is that of
            ``current`` and of the result, too.

    Returns:
        (B, N) rows of the tables.
    """
    groups, size = tables.num_codebooks, tables.codebook_size
    batch = len(current)
    scores = scores.view(batch, groups, size)[:, order]
    first = order * size
    kept, *kept_later = kept_per_level(groups, size)
    scores, best = _smallest(scores, kept)
    # Per group of codebooks: centres in use (rows of the tables), and candidates as
    # positions in these, (batch, groups, candidates, codebooks). The present choice
    # comes first and is no candidate.
    centers = torch.cat([current.unsqueeze(-1), best + first.unsqueeze(-1)], dim=2)
    members = torch.arange(kept + 1, device=current.device).view(1, 1, -1, 1)
    members = members.expand(batch, groups, -1, 1)
    joined = 1
    for wanted in kept_later:
        groups //= 2
        span = centers.shape[-1]
        pairs = centers.view(batch, groups, 2, span)
        sides = members.view(batch, groups, 2, kept + 1, joined)
        cross = _cross_products(tables.products, pairs, sides)
        scores = _join_scores(scores.view(batch, groups, 2, kept), cross)
        joined *= 2
        old, kept = kept, wanted
        scores, best = _smallest(scores, kept)
        choice = torch.stack([best // old, best % old], dim=2)
        choice = F.pad(choice + 1, (1, 0)).unsqueeze(-1)
        sides = sides.gather(3, choice.expand(*choice.shape[:-1], sides.shape[-1]))
        members = torch.cat([sides[:, :, 0], sides[:, :, 1] + span], dim=-1)
        centers = centers.view(batch, groups, 2 * span)
        if groups > 1:
            centers, members = _drop_unused(centers, members)
    return centers.view(batch, -1).gather(1, members[:, 0, 1])


def _smallest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` smallest of scores (..., C), in any order, and where they are."""
    if count == scores.shape[-1]:
        index = torch.arange(count, device=scores.device)
        return scores, index.expand(scores.shape)
    if count == 1:
        return scores.min(dim=-1, keepdim=True)
    return scores.topk(count, dim=-1, largest=False, sorted=False)


def _cross_products(products: Tensor, pairs: Tensor, sides: Tensor) -> Tensor:
    """Products between the candidates of two groups.

    Args:
        products: (N*K, N*K).
        pairs: (B, G, 2, M) centres in use by both groups of G pairs.
        sides: (B, G, 2, C, L) positions in M of the L centres of C candidates.

    Returns:
        (B, G, C, C): sums of the products of their centres.
    """
    batch, groups, _, span = pairs.shape
    count, joined = sides.shape[-2:]
    dtype = torch.int32 if products.numel() < 2**31 else torch.int64
    left, right = (pairs * pairs.new_tensor([[len(products)], [1]])).to(dtype).unbind(2)
    index = left.unsqueeze(-1) + right.unsqueeze(-2)
    block = products.view(-1).index_select(0, index.view(-1))
    if joined == 1:
        return block.view(batch, groups, count, count)
    total = batch * groups
    start = torch.arange(total, device=pairs.device).view(batch, groups, 1, 1) * span
    for side in (0, 1):
        rows = (sides[:, :, side] + start).view(-1, joined)
        block = F.embedding_bag(rows, block.reshape(total * span, -1), mode="sum")
        block = block.view(total, count, -1).transpose(1, 2)
    return block.unflatten(0, (batch, groups))


def _join_scores(scores: Tensor, cross: Tensor) -> Tensor:
    """Scores of all pairs of candidates.

    Args:
        scores: (B, G, 2, C) of two groups.
        cross: (B, G, C + 1, C + 1) products of centres; the present choice is first.

    Returns:
        (B, G, C * C), up to a constant.
    """
    # d_a.d_b of the changes d, up to a constant, is a.b - a.b' - a'.b, with a' and b'
    # the present choice.
    left = torch.sub(scores[:, :, 0], cross[..., 1:, 0], alpha=2)
    right = torch.sub(scores[:, :, 1], cross[..., 0, 1:], alpha=2)
    joined = left.unsqueeze(-1) + right.unsqueeze(-2)
    return joined.add_(cross[..., 1:, 1:], alpha=2).flatten(2)


def _drop_unused(centers: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Drop centres that no candidate uses, so that later blocks are small.

    Args:
        centers: (B, G, M) rows of the tables.
        members: (B, G, C, L) positions in M.

    Returns:
        The same with a smaller M, padded to the longest.
    """
    used = torch.zeros(centers.shape, dtype=torch.int64, device=centers.device)
    used.scatter_(2, members.flatten(2), 1)
    place = used.cumsum(dim=2)
    width = int(place[..., -1].max())
    members = place.gather(2, members.flatten(2)).view(members.shape) - 1
    place = torch.where(used > 0, place - 1, width)
    kept = centers.new_zeros(*centers.shape[:2], width + 1)
    return kept.scatter_(2, place, centers)[..., :width].contiguous(), members


# Least decrease of the error, as a share of the explained energy: smaller ones may be
# rounding.
MARGIN = 1e-6


def improve(tables: GramTables, linear: Tensor, codes: Tensor, passes: int) -> Tensor:
    """Look for better codes by further passes, which never make an error larger.

    A pass of :func:`refine` joins fixed pairs of codebooks, so it ends where no change
    of such a pair, and of pairs of pairs, helps. Here every pass pairs the codebooks
    anew, and a vector takes new codes only if they are better.

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

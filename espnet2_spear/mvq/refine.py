"""Joint search of the codes of one vector, on inner products alone.

A vector x is approximated by a sum of one centre per codebook. The squared error of
any choice depends on x only through the products x.c with every centre c, and on the
centres only through their products with each other. With both tables at hand a search
never touches the vectors themselves, whose dimension is large.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_KEPT = 128


class GramTables:
    """Inner products of the centres of all codebooks.

    The mean centre of every codebook is moved into ``shift``: the codes are the same,
    and float32 rounding acts on smaller numbers.

    Args:
        centers: (N, K, D) of N codebooks with K centres each.
    """

    def __init__(self, centers: Tensor) -> None:
        self.num_codebooks, self.codebook_size, dim = centers.shape
        means = centers.mean(dim=1, keepdim=True)
        self.shift = means.sum(dim=(0, 1))  # (D,)
        self.centers = (centers - means).reshape(-1, dim)  # (N*K, D)
        self.norms = self.centers.square().sum(dim=1)  # (N*K,)
        # Products within a codebook never occur: one of its centres is in use.
        products = self.centers @ self.centers.T
        blocks = products.view(self.num_codebooks, self.codebook_size, -1)
        for n, block in enumerate(blocks.split(1)):
            start = n * self.codebook_size
            block[..., start : start + self.codebook_size] = 0
        self.products = products  # (N*K, N*K)

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


def refine(tables: GramTables, linear: Tensor, codes: Tensor, iters: int) -> Tensor:
    """Run refinement passes.

    Args:
        tables: inner products of the centres.
        linear: (B, N*K) from :meth:`GramTables.linear_terms`.
        codes: (B, N) int64 to start from.
        iters: number of passes.

    Returns:
        (B, N) int64.
    """
    codes = codes.clone()
    active = torch.arange(len(codes), device=codes.device)
    for _ in range(iters):
        old = codes[active]
        new = refine_once(tables, linear[active], old)
        codes[active] = new
        # A pass depends on nothing but the codes it starts from, so a vector whose
        # codes stay is finished.
        active = active[(new != old).any(dim=1)]
        if len(active) == 0:
            break
    return codes


def refine_once(tables: GramTables, linear: Tensor, codes: Tensor) -> Tensor:
    """One pass: candidates per codebook, joined pair by pair into one group.

    Shapes are as in :func:`refine`. With e the error of the present codes, the score
    of a candidate of some group of codebooks is the squared error ||e + d||^2 after
    the group alone changes by d, up to a constant. Joining two groups adds 2 d_a.d_b.
    """
    num, size = tables.num_codebooks, tables.codebook_size
    batch = len(codes)
    first = torch.arange(num, device=codes.device) * size
    current = codes + first  # rows of the tables of products
    # Score of a centre: its linear term and its products with the current centres of
    # the other codebooks.
    scores = F.embedding_bag(current, tables.products, mode="sum")
    scores = torch.add(linear, scores, alpha=2).view(batch, num, size)
    kept = min(num_kept(1, size) if num > 1 else 1, size)
    scores, best = _smallest(scores, kept)
    # entries: rows of the tables of products; the current centre comes first.
    entries = torch.cat([current.unsqueeze(-1), best + first.unsqueeze(-1)], dim=2)
    width = kept + 1
    # members: per group and candidate, positions in the group's entries.
    members = torch.arange(width, device=codes.device).view(1, 1, width, 1)
    members = members.expand(batch, num, width, 1)
    joined = 1
    while num > 1:
        num //= 2
        span = joined * width
        pairs = entries.view(batch, num, 2, span)
        sides = members.view(batch, num, 2, -1, joined)
        cross = _cross_products(tables.products, pairs, sides)
        # d_a.d_b, up to a constant, from products of centres.
        cross = cross - cross[..., :1] - cross[..., :1, :]
        scores = scores.view(batch, num, 2, -1)
        scores = scores[:, :, 0].unsqueeze(-1) + scores[:, :, 1].unsqueeze(-2)
        scores = torch.add(scores, cross[..., 1:, 1:], alpha=2)
        count = scores.shape[-1]
        joined *= 2
        scores = scores.flatten(2)
        kept = min(num_kept(joined, size) if num > 1 else 1, scores.shape[-1])
        scores, best = _smallest(scores, kept)
        left = F.pad(best // count + 1, (1, 0))
        right = F.pad(best % count + 1, (1, 0))
        index = torch.stack([left, right], dim=2)
        sides = sides.gather(
            3, index.unsqueeze(-1).expand(*index.shape, sides.shape[-1])
        )
        members = torch.cat([sides[:, :, 0], sides[:, :, 1] + span], dim=-1)
    return entries.view(batch, -1).gather(1, members[:, 0, 1]) - first


def _smallest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
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
        pairs: (B, G, 2, M) rows of ``products`` used by both groups of G pairs.
        sides: (B, G, 2, C, L) positions in M of the L centres of C candidates.

    Returns:
        (B, G, C, C): sum of the products of their centres.
    """
    batch, groups, _, span = pairs.shape
    count, joined = sides.shape[-2:]
    index = pairs[:, :, 0].unsqueeze(-1) * len(products) + pairs[:, :, 1].unsqueeze(-2)
    block = products.view(-1).take(index)
    if joined == 1:
        return block
    total = batch * groups
    start = torch.arange(total, device=pairs.device).view(batch, groups, 1, 1) * span
    for side in (0, 1):
        rows = (sides[:, :, side] + start).view(-1, joined)
        block = F.embedding_bag(rows, block.reshape(total * span, -1), mode="sum")
        block = block.view(total, count, -1).transpose(1, 2)
    return block.reshape(batch, groups, count, count)

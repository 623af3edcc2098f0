"""Inner products of centres, which are all that a joint search of codes needs.

A vector x is approximated by a sum of one centre per codebook. The squared error of
any choice depends on x only through the products x.c with every centre c, and on the
centres only through their products with each other. With both tables at hand a search
never touches the vectors themselves, whose dimension is large.
"""

from __future__ import annotations

import torch
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

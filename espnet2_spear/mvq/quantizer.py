"""Multi-codebook vector quantizer.

A vector is approximated by a sum of one centre from each of N codebooks of K centres:
additive, not residual, and without an order of the codebooks.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from espnet2_spear.mvq.abs_quantizer import AbsQuantizer, QuantizerError
from espnet2_spear.mvq.gram import GramTables
from espnet2_spear.mvq.refine import refine

SCALE_SPEED = 10.0  # makes the two scales learn ten times as fast


class Quantizer(AbsQuantizer):
    """Codes found by a joint search, which starts from a linear classifier's.

    Its state dict has the names of the multi-quantization library's, and ``mean`` and
    ``std`` besides.

    Args:
        dim: D, dimension of the vectors.
        codebook_size: K, centres per codebook, a power of two.
        num_codebooks: N, a power of two.

    Raises:
        QuantizerError: sizes that are no powers of two.
    """

    kind = "mvq"
    default_refine_iters = 5

    def __init__(self, dim: int, codebook_size: int, num_codebooks: int) -> None:
        for name, value in (
            ("codebook_size", codebook_size),
            ("num_codebooks", num_codebooks),
        ):
            if value < 1 or value & (value - 1):
                raise QuantizerError(f"{name} is {value}; it must be a power of two")
        super().__init__(dim, codebook_size, num_codebooks)
        self.to_logits = nn.Linear(dim, num_codebooks * codebook_size)
        with torch.no_grad():
            self.centers.copy_(self.to_logits.weight.view(self.centers.shape))
        self.logits_scale = nn.Parameter(torch.zeros(()))
        self.centers_scale = nn.Parameter(torch.zeros(()))

    def center_scale(self) -> Tensor:
        """Scalar that the centres are multiplied with before they are summed."""
        return (SCALE_SPEED * self.centers_scale).exp()

    def logits(self, x: Tensor) -> Tensor:
        """Scores (B, N, K) from which the search starts, of standardised x (B, D)."""
        logits = self.to_logits(x * (SCALE_SPEED * self.logits_scale).exp())
        return logits.view(len(x), self.num_codebooks, self.codebook_size)

    def _needs_tables(self, passes: int) -> bool:
        return passes > 0

    def _search(self, x: Tensor, passes: int, tables: GramTables | None) -> Tensor:
        codes = self.logits(x).argmax(dim=-1)
        if tables is None or passes == 0:
            return codes
        return refine(tables, tables.linear_terms(x), codes, passes)

    def product_quantizer(self) -> Quantizer:
        """Quantizer with half the codebooks, each made of two adjacent ones.

        Code k1 of the even and k2 of the odd codebook become k1 * K + k2. It gives
        the same sums of centres.
        """
        num, size = self.num_codebooks // 2, self.codebook_size**2
        merged = Quantizer(self.dim, size, num).to(self.centers.device)

        def join(table: Tensor) -> Tensor:
            pairs = table.reshape(num, 2, self.codebook_size, -1)
            sums = pairs[:, 0].unsqueeze(2) + pairs[:, 1].unsqueeze(1)
            return sums.flatten(1, 2)  # (num, size, columns)

        with torch.no_grad():
            merged.centers.copy_(join(self.centers))
            merged.to_logits.weight.copy_(join(self.to_logits.weight).flatten(0, 1))
            merged.to_logits.bias.copy_(join(self.to_logits.bias).flatten())
            merged.logits_scale.copy_(self.logits_scale)
            merged.centers_scale.copy_(self.centers_scale)
            merged.mean.copy_(self.mean)
            merged.std.copy_(self.std)
        merged.metadata = dict(self.metadata)
        return merged

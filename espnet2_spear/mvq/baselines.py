"""Quantizers that MVQ is compared with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from espnet2_spear.mvq.abs_quantizer import AbsQuantizer, QuantizerError
from espnet2_spear.mvq.gram import GramTables

CODE_DIM = 16  # of BEST-RQ, arXiv 2202.01855


class ResidualQuantizer(AbsQuantizer):
    """Residual quantizer: every codebook describes what the earlier ones left.

    Each code is the nearest centre to the residual; nothing is revised. (B, N) codes
    are found on inner products alone, as those of MVQ.
    """

    kind = "rvq"
    joint_search = False  # the means of later codebooks must not be taken off x

    def _search(self, x: Tensor, passes: int, tables: GramTables | None) -> Tensor:
        assert tables is not None
        size = self.codebook_size
        scores = tables.linear_terms(x)
        codes = []
        for n in range(self.num_codebooks):
            code = scores[:, n * size : (n + 1) * size].argmin(dim=1)
            codes.append(code)
            if n + 1 < self.num_codebooks:
                scores += 2 * tables.products[code + n * size]
        return torch.stack(codes, dim=1)


class KMeansQuantizer(ResidualQuantizer):
    """One codebook: the code of a vector is its nearest centre."""

    kind = "kmeans"

    def __init__(self, dim: int, codebook_size: int, num_codebooks: int = 1) -> None:
        if num_codebooks != 1:
            raise QuantizerError(
                f"k-means has one codebook, not {num_codebooks}: give --num_codebooks "
                "1 (recipe: --speech_codebooks 1 --audio_codebooks 1), or use rvq"
            )
        super().__init__(dim, codebook_size, num_codebooks)


class RandomProjectionQuantizer(AbsQuantizer):
    """Random projections and random codebooks (BEST-RQ, arXiv 2202.01855).

    Code n is the entry of codebook n that is nearest in angle to projection n of the
    vector. Neither learns anything; the centres, which the codes do not depend on, are
    fitted so that their sums approximate the vectors.

    Args:
        dim: D, dimension of the vectors.
        codebook_size: K, entries per codebook.
        num_codebooks: N.
        code_dim: P, dimension of the projections and of the codebooks' entries.
        seed: that they are drawn with.

    Attributes:
        projections: (D, N * P), Xavier initialised.
        codebooks: (N, K, P), of length 1.
    """

    kind = "random"

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int,
        code_dim: int = CODE_DIM,
        seed: int = 0,
    ) -> None:
        super().__init__(dim, codebook_size, num_codebooks)
        if code_dim < 1:
            raise QuantizerError(f"code_dim is {code_dim}; at least 1")
        generator = torch.Generator().manual_seed(seed)
        limit = (6 / (dim + code_dim)) ** 0.5
        projections = torch.rand(dim, num_codebooks * code_dim, generator=generator)
        shape = (num_codebooks, codebook_size, code_dim)
        codebooks = F.normalize(torch.randn(shape, generator=generator), dim=-1)
        self.register_buffer("projections", (2 * projections - 1) * limit)
        self.register_buffer("codebooks", codebooks)

    def _needs_tables(self, passes: int) -> bool:
        return False

    def _search(self, x: Tensor, passes: int, tables: GramTables | None) -> Tensor:
        # The length of the projection does not change which entry is nearest.
        projected = (x @ self.projections).unflatten(1, (self.num_codebooks, -1))
        return torch.einsum("bnp,nkp->bnk", projected, self.codebooks).argmax(dim=-1)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> RandomProjectionQuantizer:
        """Build from a state dict; see the base class."""
        num, size, dim = state["centers"].shape
        quantizer = cls(dim, size, num, code_dim=state["codebooks"].shape[-1])
        quantizer.load_state_dict(state)
        return quantizer

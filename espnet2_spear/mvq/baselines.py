"""Quantizers that MVQ is compared with, and their training.

With centres c and entries v of codebook n, and projections P:

    rvq     i_n = argmin_k ||x - sum_{m<n} c[m, i_m] - c[n, k]||, one after the other
    kmeans  the same with a single codebook; HuBERT-like with 2000 entries
    random  i_n = argmax_k cos(P_n x, v[n, k]); nothing is learned (arXiv 2202.01855)
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from espnet2_spear.constants import MAX_CODEBOOK_SIZE
from espnet2_spear.errors import UserError
from espnet2_spear.mvq.embedding_set import TrainingFrames
from espnet2_spear.mvq.quantizer import AbsQuantizer
from espnet2_spear.mvq.training import channel_statistics, check_seed

CODE_DIM = 16  # of BEST-RQ, arXiv 2202.01855
INIT_FRAMES = 16  # per centre, for k-means++
RIDGE = 1e-3  # of the least squares, in frames: entries that never occur become 0


class ResidualQuantizer(AbsQuantizer):
    """Residual quantizer: every codebook describes what the earlier ones left.

    Each code is the nearest centre to the residual; nothing is revised. (B, N) codes
    are found on inner products alone, as those of MVQ.
    """

    kind = "rvq"
    joint_search = False  # the means of later codebooks must not be taken off x

    def _search(self, x: Tensor, passes: int) -> Tensor:
        tables, size = self.tables(), self.codebook_size
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


class RandomProjectionQuantizer(AbsQuantizer):
    """Random projections and random codebooks (BEST-RQ, arXiv 2202.01855).

    Code n is the entry of codebook n that is nearest in angle to projection n of the
    vector. Neither learns anything; the centres, which the codes do not depend on, are
    fitted so that their sums approximate the vectors.

    Args:
        dim: D, dimension of the vectors.
        codebook_size: K, entries per codebook.
        num_codebooks: N.
        seed: that the projections and codebooks are drawn with.

    Attributes:
        projections: (D, N * P), Xavier initialised, P = 16.
        codebooks: (N, K, P), of length 1.
    """

    kind = "random"
    projections: Tensor
    codebooks: Tensor

    def __init__(
        self, dim: int, codebook_size: int, num_codebooks: int, seed: int = 0
    ) -> None:
        super().__init__(dim, codebook_size, num_codebooks)
        generator = torch.Generator().manual_seed(seed)
        limit = (6 / (dim + CODE_DIM)) ** 0.5
        projections = torch.rand(dim, num_codebooks * CODE_DIM, generator=generator)
        shape = (num_codebooks, codebook_size, CODE_DIM)
        codebooks = F.normalize(torch.randn(shape, generator=generator), dim=-1)
        self.register_buffer("projections", (2 * projections - 1) * limit)
        self.register_buffer("codebooks", codebooks)

    def _search(self, x: Tensor, passes: int) -> Tensor:
        # The length of the projection does not change which entry is nearest.
        projected = (x @ self.projections).unflatten(1, (self.num_codebooks, -1))
        return torch.einsum("bnp,nkp->bnk", projected, self.codebooks).argmax(dim=-1)


@dataclass(frozen=True)
class BaselineConfig:
    """Options of the training of a baseline.

    Attributes:
        quantizer: kmeans, rvq or random.
        num_codebooks: N; 1 for kmeans.
        codebook_size: K; codes of more than 256 entries take two bytes in memory and
            four in an ark. (HuBERT-like k-means has 2000.)
        standardize: as of MVQ.
        iters: batches that the centres of a codebook are updated with.
        batch_frames: frames in such a batch.
        seed: of the projections, the first centres and the draws of frames.

    Raises:
        UserError: values out of range, or k-means with more than one codebook.
    """

    quantizer: str
    num_codebooks: int = 1
    codebook_size: int = 256
    standardize: bool = True
    iters: int = 200
    batch_frames: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_codebooks", "iters", "batch_frames"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; at least 1")
        check_seed(self.seed)
        if self.quantizer == KMeansQuantizer.kind and self.num_codebooks != 1:
            raise UserError(
                f"k-means has one codebook, not {self.num_codebooks}: give "
                "--num_codebooks 1 (the recipe's --quantizer kmeans does), or use rvq"
            )
        if not 2 <= self.codebook_size <= MAX_CODEBOOK_SIZE:
            raise UserError(
                f"codebook_size is {self.codebook_size}; from 2 to "
                f"{MAX_CODEBOOK_SIZE}, because codes are int16 in memory"
            )


def train_baseline(
    config: BaselineConfig, data: TrainingFrames, device: str | torch.device = "cpu"
) -> AbsQuantizer:
    """Train; the same seed gives the same quantizer.

    Args:
        config: see there.
        data: embeddings.
        device: for the residuals and the codes; the clustering runs on the CPU.

    Raises:
        UserError: constant embeddings, or fewer frames than centres.
    """
    mean, std = channel_statistics(data, config.seed)
    if data.num_train < config.codebook_size:
        raise UserError(
            f"{data.source}: {data.num_train} frames for {config.codebook_size} "
            "centres; embed more audio (recipe stage 4)"
        )
    sizes = (data.dim, config.codebook_size, config.num_codebooks)
    quantizer: AbsQuantizer
    if config.quantizer == RandomProjectionQuantizer.kind:
        quantizer = RandomProjectionQuantizer(*sizes, seed=config.seed)
    else:
        kinds = {cls.kind: cls for cls in (KMeansQuantizer, ResidualQuantizer)}
        quantizer = kinds[config.quantizer](*sizes)
    if config.standardize:
        quantizer.mean.copy_(mean)
        quantizer.std.copy_(std)
    quantizer = quantizer.to(device).eval().requires_grad_(False)
    if isinstance(quantizer, RandomProjectionQuantizer):
        _fit_centers(quantizer, config, data)
    else:
        _cluster_residuals(quantizer, config, data)
    quantizer.stamp()
    return quantizer


def _cluster_residuals(
    quantizer: AbsQuantizer, config: BaselineConfig, data: TrainingFrames
) -> None:
    """Train codebook after codebook: k-means on the residuals of the earlier ones."""
    # Here: importing it takes as long as torch, and opening a quantizer needs it not.
    from sklearn.cluster import MiniBatchKMeans

    def residual(frames: Tensor, codebook: int) -> Tensor:
        x = quantizer.standardise(frames.to(quantizer.centers.device))
        for centers in quantizer.centers[:codebook]:
            scores = torch.addmm(centers.square().sum(dim=1), x, centers.T, alpha=-2)
            x = x - centers[scores.argmin(dim=1)]
        return x

    first = data.train_sample(INIT_FRAMES * config.codebook_size, config.seed)
    for n in range(config.num_codebooks):
        # Residuals have heavy tails: scikit-learn's default, to move centres of few
        # members to random frames, spends most of them on outliers.
        kmeans = MiniBatchKMeans(
            config.codebook_size,
            n_init=1,
            # Scikit-learn's default looks at 3072 frames, too few for 2000 centres.
            init_size=max(3072, 8 * config.codebook_size),
            reassignment_ratio=0.0,
            random_state=config.seed + n,
        )
        kmeans.partial_fit(residual(first, n).cpu().numpy())
        for step in range(config.iters):
            batch = data.train_batch(
                config.batch_frames, config.seed, n * config.iters + step
            )
            x = residual(batch, n)
            kmeans.partial_fit(x.cpu().numpy())
        quantizer.centers[n] = torch.from_numpy(kmeans.cluster_centers_)
        left = residual(batch, n + 1).square().sum() / x.square().sum()
        logging.info(
            f"codebook {n + 1} of {config.num_codebooks}: leaves {float(left):.4f} of "
            "what it was given (last batch)"
        )


def _fit_centers(
    quantizer: RandomProjectionQuantizer, config: BaselineConfig, data: TrainingFrames
) -> None:
    """Fit the centres by least squares, so that their sums approximate the frames."""
    size, entries = quantizer.codebook_size, quantizer.centers.flatten(0, 1)
    first = torch.arange(quantizer.num_codebooks, device=entries.device) * size
    counts = entries.new_zeros(len(entries) ** 2, dtype=torch.float64)
    sums = entries.new_zeros(entries.shape, dtype=torch.float64)
    for step in range(config.iters):
        batch = data.train_batch(config.batch_frames, config.seed, step)
        batch = batch.to(entries.device)
        rows = quantizer.encode(batch) + first
        pairs = rows.unsqueeze(2) * len(entries) + rows.unsqueeze(1)
        counts += torch.bincount(pairs.flatten(), minlength=len(counts))
        x = quantizer.standardise(batch).double()
        for row in rows.T:
            sums.index_add_(0, row, x)
    counts = counts.view(len(entries), -1)
    counts.diagonal().add_(RIDGE)
    fitted = torch.linalg.solve(counts, sums).float()
    quantizer.centers.copy_(fitted.view_as(quantizer.centers))

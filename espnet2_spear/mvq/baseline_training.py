"""Training of the quantizers that MVQ is compared with."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from espnet2_spear.mvq.abs_quantizer import AbsQuantizer
from espnet2_spear.mvq.baselines import (
    KMeansQuantizer,
    RandomProjectionQuantizer,
    ResidualQuantizer,
)
from espnet2_spear.mvq.embeddings import EmbeddingError, TrainingFrames
from espnet2_spear.mvq.statistics import channel_statistics
from espnet2_spear.mvq.training import TrainingError, check_seed

MAX_CODEBOOK_SIZE = 256  # a code is stored in a byte
INIT_FRAMES = 16  # per centre, for k-means++
RIDGE = 1e-3  # of the least squares, in frames: entries that never occur become 0


@dataclass(frozen=True)
class BaselineConfig:
    """What a trained baseline depends on, beside its embeddings.

    Attributes:
        quantizer: kmeans, rvq or random.
        num_codebooks: N; 1 for kmeans.
        codebook_size: K, at most 256.
        standardize: as of MVQ.
        iters: batches that the centres of a codebook are updated with.
        batch_frames: frames in such a batch.
        seed: of the projections, the first centres and the order of frames.

    Raises:
        TrainingError: values out of range.
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
                raise TrainingError(f"{name} is {getattr(self, name)}; at least 1")
        check_seed(self.seed)
        if not 2 <= self.codebook_size <= MAX_CODEBOOK_SIZE:
            raise TrainingError(
                f"codebook_size is {self.codebook_size}; from 2 to "
                f"{MAX_CODEBOOK_SIZE}, because a code is stored in a byte"
            )


def train_baseline(
    config: BaselineConfig,
    data: TrainingFrames,
    device: str | torch.device = "cpu",
    progress: Callable[[str], None] = logging.info,
) -> AbsQuantizer:
    """Train; the same seed gives the same quantizer.

    Args:
        config: see there.
        data: embeddings.
        device: for the residuals and the codes; the clustering runs on the CPU.
        progress: gets a line now and then.

    Raises:
        EmbeddingError: constant embeddings, or fewer frames than centres.
        QuantizerError: k-means with more than one codebook.
    """
    mean, std = channel_statistics(data, config.seed)
    if data.num_train < config.codebook_size:
        raise EmbeddingError(
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
        _cluster_residuals(quantizer, config, data, progress)
    quantizer.stamp()
    return quantizer


def _cluster_residuals(
    quantizer: AbsQuantizer,
    config: BaselineConfig,
    data: TrainingFrames,
    progress: Callable[[str], None],
) -> None:
    """Codebook after codebook, k-means of what the earlier ones leave."""

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
        progress(
            f"codebook {n + 1} of {config.num_codebooks}: leaves {float(left):.4f} of "
            "what it was given (last batch)"
        )


def _fit_centers(
    quantizer: RandomProjectionQuantizer, config: BaselineConfig, data: TrainingFrames
) -> None:
    """Least squares: sums of the codes' centres near the frames."""
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

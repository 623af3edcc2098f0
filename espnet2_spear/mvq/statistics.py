"""Mean and standard deviation of embeddings, by channel."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from espnet2_spear.mvq.embeddings import EmbeddingError, TrainingFrames

STATS_FRAMES = 50_000


def channel_statistics(data: TrainingFrames, seed: int) -> tuple[Tensor, Tensor]:
    """Measure a sample of the training frames.

    Args:
        data: embeddings.
        seed: of the sample.

    Returns:
        mean and standard deviation, float64 (D,) each; the latter is 1 for a channel
        that is constant, which is logged.

    Raises:
        EmbeddingError: all channels are constant.
    """
    total = torch.zeros(data.dim, dtype=torch.float64)
    square, count = torch.zeros_like(total), 0
    for chunk in data.train_chunks(STATS_FRAMES, seed):
        chunk = chunk.double()
        total += chunk.sum(dim=0)
        square += chunk.square().sum(dim=0)
        count += len(chunk)
    mean = total / count
    var = (square / count - mean.square()).clamp(min=0)
    constant = var <= 1e-10 * (mean.square() + 1e-20)
    if constant.all():
        raise EmbeddingError(
            f"{data.source}: all frames are equal; the teacher does not see its "
            "audio, or the audio is silent"
        )
    if constant.any():
        logging.warning(
            f"{data.source}: {int(constant.sum())} of {data.dim} channels are constant"
        )
    return mean, var.sqrt().masked_fill(constant, 1.0)

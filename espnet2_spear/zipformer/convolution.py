"""Convolution module of the Zipformer: gated and depthwise, causal by chunks if wanted.

The module is the Conformer's (arXiv 2310.11230, figure 2); the chunk-wise causal one is
that of the reference's streaming networks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet2_spear.zipformer.frames import Frames, Past
from espnet2_spear.zipformer.fusion import fusible, replaceable
from espnet2_spear.zipformer.regularizers import balancer, whiten, whitening_limit
from espnet2_spear.zipformer.scaling import (
    SWOOSH_R,
    linear,
    scaled_linear,
    swoosh_linear,
)
from espnet2_spear.zipformer.schedule import BatchCount


@replaceable
def depthwise(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """Convolve (B, T, dim) over time."""
    return conv(x.transpose(1, 2)).transpose(1, 2)


class ChunkCausalConv(nn.Module):
    """Depthwise convolution that looks ahead within a chunk only.

    The sum of a causal convolution of (kernel + 1) / 2 frames and of a symmetric one
    of each chunk by itself, which is multiplied by 1 + edge scales: of the frames
    near the start of a chunk, and of those near its end.

    Args:
        dim: channels.
        kernel: odd width in frames.
    """

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.causal_conv = nn.Conv1d(dim, dim, (kernel + 1) // 2, groups=dim)
        self.chunkwise_conv = nn.Conv1d(
            dim, dim, kernel, padding=kernel // 2, groups=dim
        )
        self.chunkwise_conv_scale = nn.Parameter(torch.zeros(2, dim, kernel))

    def forward(self, x: Tensor, frames: Frames, past: Past | None = None) -> Tensor:
        """Map (B, T, dim), zero in the padding, to (B, T, dim)."""
        b, t, c = x.shape
        reach = self.kernel // 2
        longer = x if past is None else past.extend("frames", x, reach)
        missing = reach + t - longer.size(1)
        causal = depthwise(self.causal_conv, F.pad(longer, (0, 0, missing, 0)))

        # A lone piece shorter than a chunk is its own, shorter chunk.
        chunk = t if frames.chunk < 0 else frames.chunk
        chunk = chunk if frames.first is False else min(chunk, t)
        chunks = F.pad(x, (0, 0, 0, -t % chunk)).reshape(-1, chunk, c)
        chunks = depthwise(self.chunkwise_conv, chunks).reshape(b, -1, chunk, c)
        chunks = chunks * self._edge_scale(chunk, frames)
        return causal + chunks.reshape(b, -1, c)[:, :t]

    def _edge_scale(self, chunk: int, frames: Frames) -> Tensor:
        """Scale of the chunkwise convolution.

        Returns:
            (chunk, dim); in exact mode (B, 1, chunk, dim), where an utterance shorter
            than a chunk is its own chunk, too.
        """
        start, end = self.chunkwise_conv_scale
        extra = max(0, chunk - self.kernel)
        scale = 1.0 + F.pad(start, (0, extra))[:, :chunk]
        if not frames.exact or frames.first is False:
            scale = scale + F.pad(end, (extra, 0))[:, -chunk:]
            return scale.transpose(0, 1)
        size = frames.lengths().clamp(min=1, max=chunk)
        if isinstance(frames.first, Tensor):
            size = torch.where(frames.first, size, chunk)
        index = torch.arange(chunk, device=end.device) + self.kernel - size[:, None]
        inside = (index >= 0) & (index < self.kernel)
        at_end = end.transpose(0, 1)[index.clamp(0, self.kernel - 1)]
        at_end = at_end * inside[..., None].to(end.dtype)
        return (scale.transpose(0, 1) + at_end)[:, None]


class Convolution(nn.Module):
    """Gated depthwise convolution over time.

    Args:
        dim: channels.
        kernel: odd width in frames.
        causal: whether it is a ChunkCausalConv.
        count: given, the regularisers of training are on.
    """

    def __init__(
        self, dim: int, kernel: int, causal: bool, count: BatchCount | None = None
    ) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * dim)
        self.depthwise_conv = (
            ChunkCausalConv(dim, kernel)
            if causal
            else nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        )
        self.out_proj = scaled_linear(dim, dim, 0.05)
        self.balance_gate = balancer(
            count,
            min_positive=((0, 0.05), (8000, 0.025)),
            max_positive=1.0,
            min_abs=1.5,
            max_abs=((0, 5.0), (8000, 10.0)),
        )
        self.balance = balancer(
            count,
            min_positive=((0, 0.1), (8000, 0.05)),
            max_positive=1.0,
            min_abs=((0, 0.2), (20000, 0.5)),
            max_abs=10.0,
        )
        self.whiten = whiten(count, whitening_limit(7.5))

    def forward(self, x: Tensor, frames: Frames, past: Past | None = None) -> Tensor:
        """Map (B, T, dim) to (B, T, dim); frames of padding count as 0."""
        x, gate = linear(self.in_proj, x).chunk(2, dim=-1)
        x = _gated(x, self.balance_gate(gate), frames.padding[..., None])
        if isinstance(self.depthwise_conv, ChunkCausalConv):
            x = self.depthwise_conv(x, frames, past)
        else:
            x = depthwise(self.depthwise_conv, x)
        return swoosh_linear(self.out_proj, self.whiten(self.balance(x)), SWOOSH_R)


@fusible
def _gated(x: Tensor, gate: Tensor, padding: Tensor) -> Tensor:
    return (x * gate.sigmoid()).masked_fill(padding, 0.0)

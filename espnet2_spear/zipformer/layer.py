"""One Zipformer layer and its feed-forward and convolution modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet2_spear.zipformer.attention import (
    AttentionWeights,
    NonlinAttention,
    SelfAttention,
)
from espnet2_spear.zipformer.scaling import (
    BiasNorm,
    Bypass,
    scaled_linear,
    swoosh_l,
    swoosh_r,
)


class FeedForward(nn.Module):
    """Linear, SwooshL, Linear.

    Args:
        dim: channels.
        hidden: width between the two linears.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, hidden)
        self.out_proj = scaled_linear(hidden, dim, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., dim)."""
        return self.out_proj(swoosh_l(self.in_proj(x)))


class Convolution(nn.Module):
    """Gated depthwise convolution over time.

    Args:
        dim: channels.
        kernel: odd width in frames.
    """

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * dim)
        self.depthwise_conv = nn.Conv1d(
            dim, dim, kernel, padding=kernel // 2, groups=dim
        )
        self.out_proj = scaled_linear(dim, dim, 0.05)

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """Map (B, T, dim) to (B, T, dim); frames where padding (B, T) count as 0."""
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        x = x * gate.sigmoid()
        if padding is not None:
            x = x.masked_fill(padding[..., None], 0.0)
        return self.out_proj(swoosh_r(self._depthwise(x)))

    def _depthwise(self, x: Tensor) -> Tensor:
        """Convolve (B, T, dim) over time.

        (B, T, dim) is what a channels-last (B, dim, T, 1) image looks like in memory:
        as a 2-D convolution it needs no copy and runs 4 to 7 times as fast on a CPU.
        """
        conv = self.depthwise_conv
        image = x.transpose(1, 2)[..., None]
        y = F.conv2d(
            image,
            conv.weight[..., None],
            conv.bias,
            padding=(conv.padding[0], 0),
            groups=conv.groups,
        )
        return y.squeeze(-1).transpose(1, 2)


class ZipformerLayer(nn.Module):
    """One layer, in the order of Zipformer's figure 2.

    Args:
        dim: channels.
        num_heads: attention heads.
        query_head_dim: width of a query or key head.
        pos_head_dim: width of a positional query head.
        value_head_dim: width of a value head.
        pos_dim: width of the positional encoding.
        feedforward_dim: hidden width of the middle feed-forward module.
        kernel: width of the depthwise convolutions in frames.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        query_head_dim: int,
        pos_head_dim: int,
        value_head_dim: int,
        pos_dim: int,
        feedforward_dim: int,
        kernel: int,
    ) -> None:
        super().__init__()
        self.self_attn_weights = AttentionWeights(
            dim, num_heads, query_head_dim, pos_head_dim, pos_dim
        )
        self.self_attn1 = SelfAttention(dim, num_heads, value_head_dim)
        self.self_attn2 = SelfAttention(dim, num_heads, value_head_dim)
        self.nonlin_attention = NonlinAttention(dim)
        self.feed_forward1 = FeedForward(dim, feedforward_dim * 3 // 4)
        self.feed_forward2 = FeedForward(dim, feedforward_dim)
        self.feed_forward3 = FeedForward(dim, feedforward_dim * 5 // 4)
        self.conv_module1 = Convolution(dim, kernel)
        self.conv_module2 = Convolution(dim, kernel)
        self.norm = BiasNorm(dim)
        self.bypass = Bypass(dim)
        self.bypass_mid = Bypass(dim)
        # Released checkpoints carry this vector although nothing reads it: it is kept
        # for round trips, and without a gradient so that DDP does not wait for one.
        self.bypass_scale = nn.Parameter(torch.full((dim,), 0.5), requires_grad=False)

    def forward(self, x: Tensor, pos: Tensor, padding: Tensor | None) -> Tensor:
        """Map x (B, T, dim).

        Args:
            x: input frames.
            pos: (2 T - 1, pos_dim) positional encoding.
            padding: (B, T) bool, True in the padding, or None.
        """
        start = x
        weights = self.self_attn_weights(x, pos, padding)
        x = x + self.feed_forward1(x)
        x = x + self.nonlin_attention(x, weights)
        x = x + self.self_attn1(x, weights)
        x = x + self.conv_module1(x, padding)
        x = x + self.feed_forward2(x)
        x = self.bypass_mid(start, x)
        x = x + self.self_attn2(x, weights)
        x = x + self.conv_module2(x, padding)
        x = x + self.feed_forward3(x)
        return self.bypass(start, self.norm(x))

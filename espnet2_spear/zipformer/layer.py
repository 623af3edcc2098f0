"""A layer of the Zipformer (arXiv 2310.11230, figure 2) and its feed-forward module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from espnet2_spear.zipformer.attention import (
    AttentionWeights,
    NonlinAttention,
    SelfAttention,
)
from espnet2_spear.zipformer.config import ZipformerConfig
from espnet2_spear.zipformer.convolution import Convolution
from espnet2_spear.zipformer.frames import Frames, Past
from espnet2_spear.zipformer.fusion import replaceable
from espnet2_spear.zipformer.regularizers import (
    SharedDropout,
    balancer,
    sequence_mask,
    whiten,
    whitening_limit,
)
from espnet2_spear.zipformer.scaling import (
    SWOOSH_L,
    BiasNorm,
    Bypass,
    linear,
    scaled_linear,
    swoosh_linear,
)
from espnet2_spear.zipformer.schedule import BatchCount, Scheduled

ATTENTION_SKIP: Scheduled = ((0, 0.2), (4000, 0.05), (16000, 0.0))
CONVOLUTION_SKIP: Scheduled = ATTENTION_SKIP
FEED_FORWARD_SKIP: Scheduled = ((0, 0.1), (4000, 0.01), (50000, 0.0))


class FeedForward(nn.Module):
    """Linear, SwooshL, Linear.

    Args:
        dim: channels.
        hidden: width between the two linears.
        count: given, the regularisers of training are on.
    """

    def __init__(self, dim: int, hidden: int, count: BatchCount | None = None) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, hidden)
        self.out_proj = scaled_linear(hidden, dim, 0.1)
        self.balance = balancer(
            count, min_positive=0.3, max_positive=1.0, min_abs=0.75, max_abs=5.0
        )
        self.dropout = SharedDropout(count)
        self.whiten = whiten(count, whitening_limit(7.5))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, dim) to (B, T, dim)."""
        return self.whiten(feed_forward(self, x))


@replaceable
def feed_forward(module: FeedForward, x: Tensor) -> Tensor:
    """Map x (B, T, dim) by the two linear maps of a module."""
    x = module.balance(linear(module.in_proj, x))
    return swoosh_linear(module.out_proj, x, SWOOSH_L, module.dropout.draw(x))


class ZipformerLayer(nn.Module):
    """One layer (a "block" in the Zipformer paper).

    Args:
        config: sizes.
        stack: index of the stack that it belongs to.
        count: given, the regularisers of training are on.
        layer_skip: share of sequences that skip the layer in training.
    """

    def __init__(
        self,
        config: ZipformerConfig,
        stack: int,
        count: BatchCount | None = None,
        layer_skip: Scheduled = 0.0,
    ) -> None:
        super().__init__()
        self.count = count
        dim, heads = config.encoder_dim[stack], config.num_heads[stack]
        hidden, kernel = config.feedforward_dim[stack], config.cnn_module_kernel[stack]
        self.self_attn_weights = AttentionWeights(
            dim,
            heads,
            config.query_head_dim,
            config.pos_head_dim,
            config.pos_dim,
            count,
        )
        self.self_attn1 = SelfAttention(dim, heads, config.value_head_dim, count)
        self.self_attn2 = SelfAttention(dim, heads, config.value_head_dim, count)
        self.nonlin_attention = NonlinAttention(dim, count)
        self.feed_forward1 = FeedForward(dim, hidden * 3 // 4, count)
        self.feed_forward2 = FeedForward(dim, hidden, count)
        self.feed_forward3 = FeedForward(dim, hidden * 5 // 4, count)
        self.conv_module1 = Convolution(dim, kernel, config.causal, count)
        self.conv_module2 = Convolution(dim, kernel, config.causal, count)
        self.norm = BiasNorm(dim, count)
        self.bypass = Bypass(dim, count, layer_skip)
        self.bypass_mid = Bypass(dim, count)
        # Released checkpoints carry this vector although nothing reads it: it is kept
        # for round trips, and without a gradient so that DDP does not wait for one.
        self.bypass_scale = nn.Parameter(torch.full((dim,), 0.5), requires_grad=False)

        branch = {"min_positive": 0.3, "max_positive": 0.7, "prob": 0.05}
        self.balance_nonlin = balancer(
            count, min_abs=((0, 0.004), (4000, 0.02)), **branch
        )
        self.balance_ff2 = balancer(
            count, min_abs=((0, 0.0), (4000, 0.1)), max_abs=2.0, **branch
        )
        self.balance_ff3 = balancer(
            count, min_abs=((0, 0.0), (4000, 0.2)), max_abs=4.0, **branch
        )
        stream = {"min_positive": 0.45, "max_positive": 0.55}
        self.balance_sum = balancer(count, min_abs=0.2, max_abs=4.0, **stream)
        self.balance_out = balancer(count, min_abs=0.1, max_abs=4.0, **stream)
        self.whiten = whiten(count, whitening_limit(4.0, 3.0))

    def forward(self, x: Tensor, frames: Frames, past: Past | None = None) -> Tensor:
        """Map x (B, T, dim).

        Args:
            x: input frames.
            frames: their positions and masks.
            past: frames kept in streaming.
        """

        def kept(name: str) -> Past | None:
            return None if past is None else past.child(name)

        start = x
        attention = self.self_attn_weights(x, frames, kept("attention"))
        x = x + self.feed_forward1(x)
        attends = self._keep(x, ATTENTION_SKIP)
        y = self.nonlin_attention(x, attention, frames, kept("nonlin"))
        x = _add(x, self.balance_nonlin(y), attends)
        y = self.self_attn1(x, attention, frames, kept("attention1"))
        x = _add(x, y, attends)
        y = self.conv_module1(x, frames, kept("conv1"))
        x = _add(x, y, self._keep(x, CONVOLUTION_SKIP))
        y = self.balance_ff2(self.feed_forward2(x))
        x = _add(x, y, self._keep(x, FEED_FORWARD_SKIP))
        x = self.bypass_mid(start, x)
        y = self.self_attn2(x, attention, frames, kept("attention2"))
        x = _add(x, y, attends)
        y = self.conv_module2(x, frames, kept("conv2"))
        x = _add(x, y, self._keep(x, CONVOLUTION_SKIP))
        y = self.balance_ff3(self.feed_forward3(x))
        x = _add(x, y, self._keep(x, FEED_FORWARD_SKIP))
        x = self.bypass(start, self.norm(self.balance_sum(x)))
        return self.whiten(self.balance_out(x))

    def _keep(self, x: Tensor, skip: Scheduled) -> Tensor | None:
        """Return which sequences a branch is added for; None: all."""
        if not self.training or self.count is None:
            return None
        rate = self.count.at(skip)
        return sequence_mask(x, rate) if rate > 0.0 else None


def _add(x: Tensor, branch: Tensor, keep: Tensor | None) -> Tensor:
    """Add a residual branch, times ``keep`` (B, 1, 1) if given."""
    return x + branch if keep is None else torch.addcmul(x, branch, keep)

"""Attention modules of the Zipformer (arXiv 2310.11230, 3.2).

Attention weights are computed once a layer and used three times: by two self-attentions
and by the non-linear attention.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet2_spear.zipformer.frames import Frames, Past
from espnet2_spear.zipformer.regularizers import (
    balancer,
    chance,
    whiten,
    whitening_limit,
)
from espnet2_spear.zipformer.scaling import linear, scaled_linear
from espnet2_spear.zipformer.schedule import BatchCount, Scheduled
from espnet2_spear.zipformer.scores import Attention, Inputs

POS_SKIP: Scheduled = ((0, 0.5), (4000, 0.0))
SCORE_PROB = 0.1  # that large scores are penalised in a call
SCORE_PENALTY = 1.0e-4


def encode_positions(
    frames: int, pos_dim: int, device: torch.device, left: int = 0
) -> Tensor:
    """Encode the offsets key - query, logarithmically compressed.

    Of an offset t, with u = sign(t) sqrt(D) (log(|t| + sqrt(D)) - log sqrt(D)) and the
    angle a = atan(2 pi u / D): cos(f a) in even and sin(f a) in odd columns, f = 1 to
    D / 2; the last column is 1.

    Args:
        frames: queries, which are the last of the keys.
        pos_dim: width D of the encoding.
        device: of the result.
        left: keys before the first query.

    Returns:
        (2 frames + left - 1, D); row r is offset r - (frames + left - 1).
    """
    t = torch.arange(1 - frames - left, frames, device=device)[:, None]
    knee = math.sqrt(pos_dim)
    t = t.sign() * knee * ((t.abs() + knee).log() - math.log(knee))
    angle = torch.atan(t * 2.0 * math.pi / pos_dim)
    angle = angle * torch.arange(1, pos_dim // 2 + 1, device=device)
    table = torch.stack([angle.cos(), angle.sin()], dim=-1).flatten(1)
    return F.pad(table[:, :-1], (0, 1), value=1.0)


class AttentionWeights(nn.Module):
    """Multi-head attention weights with relative positions.

    Args:
        dim: channels of the input.
        num_heads: heads.
        query_head_dim: width of a query or key head.
        pos_head_dim: width of a positional query head.
        pos_dim: width of the positional encoding.
        count: given, the regularisers of training are on.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        query_head_dim: int,
        pos_head_dim: int,
        pos_dim: int,
        count: BatchCount | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_head_dim = query_head_dim
        self.pos_head_dim = pos_head_dim
        width = num_heads * (2 * query_head_dim + pos_head_dim)
        # The usual 1 / sqrt(d) of the scores lives in the initial weights.
        self.in_proj = scaled_linear(dim, width, query_head_dim**-0.25)
        self.linear_pos = nn.Linear(pos_dim, num_heads * pos_head_dim, bias=False)
        with torch.no_grad():
            self.linear_pos.weight.mul_(0.05)
        self.count = count
        self.balance_keys = balancer(
            count,
            min_positive=0.4,
            max_positive=0.6,
            min_abs=0.0,
            max_abs=100.0,
            prob=0.025,
        )
        self.whiten_keys = whiten(
            count, whitening_limit(3.0), groups=num_heads, grad_scale=0.025
        )

    def forward(self, x: Tensor, frames: Frames, past: Past | None = None) -> Attention:
        """Compute attention weights.

        Args:
            x: (B, T, dim).
            frames: positions and masks.
            past: keys kept in streaming.
        """
        h, qd, pd = self.num_heads, self.query_head_dim, self.pos_head_dim
        q, k, p = linear(self.in_proj, x).split([h * qd, h * qd, h * pd], dim=-1)
        k = self.whiten_keys(self.balance_keys(k))
        if past is not None:
            k = past.extend("keys", k, frames.left)
        q, k, p = (y.unflatten(2, (h, -1)).transpose(1, 2) for y in (q, k, p))
        count = self.count if self.training else None
        if count is not None and chance(count.at(POS_SKIP)):
            # In the graph all the same: DDP waits for every gradient.
            q, p, r = q + 0.0 * self.linear_pos.weight.sum(), None, None
        else:
            r = self.linear_pos(frames.pos).unflatten(1, (h, pd)).permute(1, 2, 0)
        key_padding = cast(Tensor, frames.key_padding)  # the encoder has set it
        inputs = Inputs(q, k, p, r, key_padding, frames.seen)
        penalty = 0.0
        if count is not None and chance(SCORE_PROB):
            penalty = SCORE_PENALTY * count.loss_scale
        return Attention(inputs, penalty)


class SelfAttention(nn.Module):
    """Values of attention, given the weights.

    Args:
        dim: channels.
        num_heads: heads.
        value_head_dim: width of a value head.
        count: given, the regularisers of training are on.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        value_head_dim: int,
        count: BatchCount | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = nn.Linear(dim, num_heads * value_head_dim)
        self.out_proj = scaled_linear(num_heads * value_head_dim, dim, 0.05)
        self.whiten = whiten(count, whitening_limit(7.5, 3.0))

    def forward(
        self,
        x: Tensor,
        attention: Attention,
        frames: Frames,
        past: Past | None = None,
    ) -> Tensor:
        """Apply attention weights to x (B, T, dim)."""
        v = linear(self.in_proj, x)
        if past is not None:
            v = past.extend("values", v, frames.left)
        v = v.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        out = attention.apply(v).transpose(1, 2).flatten(2)
        return self.whiten(linear(self.out_proj, out))


class NonlinAttention(nn.Module):
    """Gated attention that uses the weights of the first head only.

    Args:
        dim: channels; the hidden width is 3/4 of it.
        count: given, the regularisers of training are on.
    """

    def __init__(self, dim: int, count: BatchCount | None = None) -> None:
        super().__init__()
        hidden = 3 * dim // 4
        self.in_proj = nn.Linear(dim, 3 * hidden)
        self.out_proj = scaled_linear(hidden, dim, 0.05)
        self.balance = balancer(
            count,
            min_positive=((0, 0.25), (20000, 0.05)),
            max_positive=((0, 0.75), (20000, 0.95)),
            min_abs=0.5,
            max_abs=5.0,
        )
        self.whiten_values = whiten(count, whitening_limit(5.0))
        self.whiten = whiten(count, whitening_limit(5.0, 3.0))

    def forward(
        self,
        x: Tensor,
        attention: Attention,
        frames: Frames,
        past: Past | None = None,
    ) -> Tensor:
        """Apply attention weights to x (B, T, dim)."""
        s, v, y = linear(self.in_proj, x).chunk(3, dim=-1)
        v = self.whiten_values(v) * self.balance(s).tanh()
        if past is not None:
            v = past.extend("values", v, frames.left)
        v = attention.apply(v.unsqueeze(1)).squeeze(1)
        return self.whiten(linear(self.out_proj, v * y))

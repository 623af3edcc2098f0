"""Attention weights with relative positions, in blocks of queries.

The weights of an utterance of T frames, (H, T, T), are the largest tensors of the
stacks, and for long audio no memory holds them. A block of them is
the same numbers. Blocks serve twice: on a CPU a block with all that it is computed
from stays in the caches; and for long audio no more than a block exists at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from espnet2_spear.zipformer.regularizers import penalize_large

MASKED_SCORE = -1000.0  # finite, as in the reference: rows of padding stay finite
SCORE_LIMIT, SCORE_PENALTY = 25.0, 1.0e-4
BLOCK = 2**21  # weights of a block
MAX_WEIGHTS = 2**27  # without gradients, more weights than these are never held at once


def relative_to_absolute(scores: Tensor, keys: int) -> Tensor:
    """Turn scores by offset into scores by key position, without copying.

    Args:
        scores: (..., Q, Q + keys - 1), last axis = key - query + Q - 1, in positions;
            contiguous.
        keys: number of keys.

    Returns:
        (..., Q, keys) view, last axis = key.
    """
    *lead, queries, _ = scores.shape
    *strides, row, step = scores.stride()
    return scores.as_strided(
        (*lead, queries, keys),
        (*strides, row - step, step),
        scores.storage_offset() + (queries - 1) * step,
    )


class Inputs(NamedTuple):
    """What attention weights are computed from.

    Attributes:
        q: (B, H, T, d) queries.
        k: (B, H, S, d) keys.
        p: (B, H, T, d') positional queries; None: positions have no say.
        r: (H, d', T + S - 1) positional keys, by key - query + T - 1.
        padding: (B, S) bool, True: no query sees this key.
        blocked: (T, S) bool, True: this query must not see this key; or None.
    """

    q: Tensor
    k: Tensor
    p: Tensor | None
    r: Tensor | None
    padding: Tensor
    blocked: Tensor | None

    def blocks(self) -> list[tuple[int, int]]:
        """Ranges of queries that are computed at once."""
        b, h, t, _ = self.q.shape
        size = max(8, BLOCK // max(1, b * h * self.k.size(2)))
        return [(i, min(i + size, t)) for i in range(0, t, size)]

    def masks(self, start: int, end: int) -> list[Tensor]:
        """What is masked of these queries' scores."""
        masks = [self.padding[:, None, None, :]]
        return masks if self.blocked is None else [*masks, self.blocked[start:end]]

    def scores(self, start: int, end: int, heads: int) -> Tensor:
        """Scores (B, heads, queries, S) of a block of queries, before masks."""
        q, k = self.q[:, :heads, start:end], self.k[:, :heads]
        b, h, n, d = q.shape
        q, k = q.reshape(b * h, n, d), k.reshape(b * h, -1, d).transpose(1, 2)
        if self.p is None or self.r is None:
            return torch.bmm(q, k).view(b, h, n, -1)
        p = self.p[:, :heads, start:end]
        by_offset = torch.matmul(p, self.positions(start, end)[:heads])
        by_key = relative_to_absolute(by_offset.view(b * h, n, -1), k.size(2))
        return torch.baddbmm(by_key, q, k).view(b, h, n, -1)

    def positions(self, start: int, end: int) -> Tensor:
        """Positional keys (H, d', end - start + S - 1) of a block of queries."""
        t, s = self.q.size(2), self.k.size(2)
        return self.r[..., t - end : t - start + s - 1]

    def weights(self, start: int, end: int, heads: int) -> Tensor:
        """Weights (B, heads, queries, S) of a block of queries, float32."""
        scores = self.scores(start, end, heads)
        for mask in self.masks(start, end):
            scores.masked_fill_(mask, MASKED_SCORE)
        return scores.softmax(dim=-1, dtype=torch.float32)

    def all_weights(self) -> Tensor:
        """Weights (B, H, T, S), float32."""
        b, h, t, _ = self.q.shape
        weights = self.q.new_empty(b, h, t, self.k.size(2))
        for start, end in self.blocks():
            weights[:, :, start:end] = self.weights(start, end, h)
        return weights


class _Shared:
    """What the backward passes of the uses of some weights do together.

    Attributes:
        uses: (gradient, values) of the uses so far: the gradient of the weights is the
            sum of their products.
        weights: computed again by the first use; nothing keeps them from the forward
            to the backward pass.
    """

    def __init__(self) -> None:
        self.uses: list[tuple[Tensor, Tensor]] = []
        self.weights: Tensor | None = None

    def again(self, inputs: Inputs) -> Tensor:
        """Weights, computed if they are not there."""
        if self.weights is None:
            self.weights = inputs.all_weights()
        return self.weights


class _Weights(torch.autograd.Function):
    """All weights. Their gradient never exists as a whole: see :class:`_Shared`."""

    @staticmethod
    def forward(ctx, q, k, p, r, padding, blocked, penalize, shared) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.penalize, ctx.shared = penalize, shared
        ctx.save_for_backward(q, k, p, r, padding, blocked)
        return Inputs(q, k, p, r, padding, blocked).all_weights()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = Inputs(*ctx.saved_tensors)
        q, k, p, r, *_ = inputs
        weights = ctx.shared.again(inputs)
        (b, h, t, d), s = q.shape, k.size(2)
        uses = [(g, v.transpose(2, 3)) for g, v in ctx.shared.uses]
        ctx.shared.uses, ctx.shared.weights = [], None
        flat_k = k.reshape(b * h, s, d)
        gq, gk = torch.empty_like(q), torch.zeros_like(flat_k)
        gp = None if p is None else torch.empty_like(p)
        gr = None if r is None else torch.zeros_like(r)
        by_offset = by_key = None
        for start, end in inputs.blocks():
            n = end - start
            part = weights.new_zeros(b, h, n, s)
            if grad is not None:
                part += grad[:, :, start:end]
            for g, v in uses:  # of all heads, or of the first one
                part[:, : g.size(1)] += torch.matmul(g[:, :, start:end], v)
            part = torch._softmax_backward_data(
                part, weights[:, :, start:end], -1, torch.float32
            )
            for mask in inputs.masks(start, end):
                part.masked_fill_(mask, 0.0)
            if ctx.penalize:
                scores = inputs.scores(start, end, h)
                part.add_(scores > SCORE_LIMIT, alpha=SCORE_PENALTY)
                part.add_(scores < -SCORE_LIMIT, alpha=-SCORE_PENALTY)
            flat = part.view(b * h, n, s)
            gq[:, :, start:end] = torch.bmm(flat, flat_k).view(b, h, n, d)
            gk.baddbmm_(flat.transpose(1, 2), q[:, :, start:end].reshape(b * h, n, d))
            if p is None:
                continue
            if by_key is None or by_key.size(1) != n:
                by_offset = flat.new_zeros(b * h, n, n + s - 1)
                by_key = relative_to_absolute(by_offset, s)
            by_key.copy_(flat)  # around it stay zeros
            part = by_offset.view(b, h, n, -1)
            positions = inputs.positions(start, end)
            gp[:, :, start:end] = torch.matmul(part, positions.transpose(1, 2))
            part_p = p[:, :, start:end].reshape(b * h, n, -1).transpose(1, 2)
            part = torch.bmm(part_p, by_offset).view(b, h, -1, n + s - 1)
            gr[..., t - end : t - start + s - 1] += part.sum(dim=0)
        return gq, gk.view(b, h, s, d), gp, gr, None, None, None, None


class _Apply(torch.autograd.Function):
    """weights @ v; hands the gradient of the weights over in two factors."""

    @staticmethod
    def forward(ctx, weights: Tensor, v: Tensor, shared, *inputs) -> Tensor:
        ctx.save_for_backward(v, *inputs)
        ctx.shared = shared
        return torch.matmul(weights[:, : v.size(1)], v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, *inputs = ctx.saved_tensors
        weights = ctx.shared.again(Inputs(*inputs))
        ctx.shared.uses.append((grad, v))
        gv = torch.matmul(weights[:, : v.size(1)].transpose(2, 3), grad)
        return None, gv, *[None] * 7


@dataclass
class Attention:
    """Attention weights, ready to be applied to values.

    Attributes:
        weights: (B, H, T, S), rows (queries) sum to 1; None: they would not fit into
            the memory, and each use computes them again, block by block.
        inputs: what they are computed from.
        shared: for the backward pass; None: autograd does it all.
    """

    weights: Tensor | None
    inputs: Inputs
    shared: _Shared | None = None

    def apply(self, v: Tensor) -> Tensor:
        """Weighted sums of values.

        Args:
            v: (B, h, S, d) values of the first h heads.

        Returns:
            (B, h, T, d).
        """
        if self.weights is None:
            return self._apply_blocks(v)
        if self.shared is None:
            return torch.matmul(self.weights[:, : v.size(1)], v)
        return _Apply.apply(self.weights, v, self.shared, *self.inputs)

    def _apply_blocks(self, v: Tensor) -> Tensor:
        inputs, heads = self.inputs, v.size(1)
        parts = [
            torch.matmul(inputs.weights(start, end, heads).to(v.dtype), v)
            for start, end in inputs.blocks()
        ]
        return torch.cat(parts, dim=2)


def attend(inputs: Inputs, penalize: bool) -> Attention:
    """Compute attention weights, or put it off if they are too many.

    Args:
        inputs: queries, keys, positions and masks.
        penalize: whether scores beyond +-25 get a gradient that shrinks them.
    """
    b, h, t, _ = inputs.q.shape
    s = inputs.k.size(2)
    if not torch.is_grad_enabled() and b * h * t * s > MAX_WEIGHTS:
        return Attention(None, inputs)
    if b * t == 0 or not _in_blocks(inputs.q):
        return Attention(_composed(inputs, penalize), inputs)
    if not torch.is_grad_enabled():
        return Attention(inputs.all_weights(), inputs)
    shared = _Shared()
    return Attention(_Weights.apply(*inputs, penalize, shared), inputs, shared)


def _in_blocks(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _composed(inputs: Inputs, penalize: bool) -> Tensor:
    """Weights by operations that autograd and torch.compile know."""
    q, k, p, r, *_ = inputs
    scores = torch.matmul(q, k.transpose(2, 3))
    if p is not None and r is not None:
        scores = scores + relative_to_absolute(torch.matmul(p, r), k.size(2))
    if penalize:
        scores = penalize_large(scores, SCORE_LIMIT, SCORE_PENALTY)
    for mask in inputs.masks(0, q.size(2)):
        scores = scores.masked_fill(mask, MASKED_SCORE)
    return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)

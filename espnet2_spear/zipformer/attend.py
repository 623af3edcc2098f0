"""Attention weights that are computed once and used several times.

Nothing keeps them from the forward to the backward pass, which computes them again.
Long utterances have too many to hold: see :mod:`.blocked_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from espnet2_spear.zipformer.blocked_attention import BlockedAttention
from espnet2_spear.zipformer.scores import (
    MASKED_SCORE,
    Inputs,
    Uses,
    add_penalty_,
    penalize,
    relative_to_absolute,
)

# More weights than these are never held at once: without gradients, and with.
MAX_WEIGHTS, MAX_TRAINED_WEIGHTS = 2**27, 2**28
# Weights of a head from which on a CPU is faster when it holds none
# (benchmarks/README.md).
CPU_WEIGHTS = 2**17


class _Shared:
    """What the backward passes of the uses of some weights do together.

    Attributes:
        uses: what the uses hand over.
        weights: computed again by the first use; nothing keeps them from the forward
            to the backward pass.
    """

    def __init__(self) -> None:
        self.uses = Uses()
        self.weights: Tensor | None = None

    def again(self, inputs: Inputs) -> Tensor:
        """Weights, computed if they are not there."""
        if self.weights is None:
            self.weights = inputs.all_weights()
        return self.weights


class _Weights(torch.autograd.Function):
    """All weights. Their gradient never exists as a whole: see :class:`_Shared`."""

    @staticmethod
    def forward(ctx, q, k, p, r, padding, seen, penalize, shared) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.penalize, ctx.shared = penalize, shared
        ctx.save_for_backward(q, k, p, r, padding, seen)
        return Inputs(q, k, p, r, padding, seen).all_weights()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = Inputs(*ctx.saved_tensors)
        q, k, p, r, *_ = inputs
        weights = ctx.shared.again(inputs)
        (b, h, t, d), s = q.shape, k.size(2)
        uses = [(g, v.transpose(2, 3)) for g, v in ctx.shared.uses.take()]
        ctx.shared.weights = None
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
                add_penalty_(part, inputs.scores(start, end))
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
        ctx.shared.uses.add(grad, v)
        gv = torch.matmul(weights[:, : v.size(1)].transpose(2, 3), grad)
        return None, gv, *[None] * 7


@dataclass
class Attention:
    """Attention weights, ready to be applied to values.

    Attributes:
        weights: (B, H, T, S), rows (queries) sum to 1.
        inputs: what they are computed from.
        shared: for the backward pass; None: autograd does it all.
    """

    weights: Tensor
    inputs: Inputs
    shared: _Shared | None = None

    def apply(self, v: Tensor) -> Tensor:
        """Weighted sums of values.

        Args:
            v: (B, h, S, d) values of the first h heads.

        Returns:
            (B, h, T, d).
        """
        if self.shared is None:
            return torch.matmul(self.weights[:, : v.size(1)], v)
        return _Apply.apply(self.weights, v, self.shared, *self.inputs)


def attend(inputs: Inputs, penalized: bool) -> Attention | BlockedAttention:
    """Compute attention weights, or put it off if they are too many.

    Args:
        inputs: queries, keys, positions and masks.
        penalized: whether scores beyond +-25 get a gradient that shrinks them.
    """
    b, h, t, _ = inputs.q.shape
    s, keeps = inputs.k.size(2), torch.is_grad_enabled()
    on_cpu = b * t > 0 and _on_cpu(inputs.q)
    too_many = b * h * t * s > (MAX_TRAINED_WEIGHTS if keeps else MAX_WEIGHTS)
    if keeps and torch.compiler.is_compiling():
        too_many = False  # graphs know plain operations only
    if too_many or (on_cpu and t * s >= CPU_WEIGHTS):
        return BlockedAttention(inputs, penalized)
    if not on_cpu:
        return Attention(_composed(inputs, penalized), inputs)
    if not keeps:
        return Attention(inputs.all_weights(), inputs)
    shared = _Shared()
    weights = _Weights.apply(*inputs, penalized, shared)
    return Attention(weights, inputs, shared)


def _on_cpu(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _composed(inputs: Inputs, penalized: bool) -> Tensor:
    """Weights by operations that autograd and torch.compile know."""
    q, k, p, r, *_ = inputs
    scores = torch.matmul(q, k.transpose(2, 3))
    if p is not None and r is not None:
        scores = scores + relative_to_absolute(torch.matmul(p, r), k.size(2))
    if penalized:
        scores = penalize(scores)
    for mask in inputs.masks(0, q.size(2)):
        scores = scores.masked_fill(mask, MASKED_SCORE)
    return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)

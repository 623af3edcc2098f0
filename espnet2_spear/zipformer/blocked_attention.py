"""Attention one head and one block of queries at a time, of which nothing is kept.

No memory holds all weights of ten minutes (8 heads of 30 000 frames: 27 GiB). Here no
more than a block of them exists, with and without gradients: every use of the weights
computes them again, and so does the backward pass of each. On a CPU a block stays in
the caches, which from some hundred frames on is faster, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from espnet2_spear.zipformer.products import product_t
from espnet2_spear.zipformer.scores import (
    MASKED_SCORE,
    Inputs,
    Uses,
    add_penalty_,
    relative_to_absolute,
)

# Weights of a block: what stays in the caches of a CPU, or what fills a GPU.
CPU_BLOCK, GPU_BLOCK, MIN_QUERIES = 2**19, 2**24, 8


@dataclass(frozen=True)
class _Head:
    """One head of one utterance; as :class:`Inputs`, float32.

    Attributes:
        q: (T, d).
        k: (S, d).
        p: (T, d') or None.
        r: (d', T + S - 1) or None.
        padding: (S,) bool; None: no key is padding.
        frames: keys before the first one that is padding.
        seen: (T, 2) or None.
    """

    q: Tensor
    k: Tensor
    p: Tensor | None
    r: Tensor | None
    padding: Tensor | None
    frames: int
    seen: Tensor | None

    def blocks(self, whole: bool = False) -> Iterator[tuple[slice, slice]]:
        """Queries, and the keys that any of them sees; ``whole``: all keys."""
        t, s = len(self.q), len(self.k)
        wanted = CPU_BLOCK if self.q.device.type == "cpu" else GPU_BLOCK
        size = wanted // s
        if self.seen is not None and not whole:
            widest = int((self.seen[:, 1] - self.seen[:, 0]).max())
            size = min(wanted // widest, widest)
        size = max(MIN_QUERIES, size)
        for start in range(0, t, size):
            end, keys = min(start + size, t), slice(0, s)
            # A query in the padding may see no key, and then weighs all alike.
            if self.seen is not None and not whole and end <= self.frames:
                seen = self.seen[start:end]
                keys = slice(int(seen[:, 0].min()), min(s, int(seen[:, 1].max())))
            yield slice(start, end), keys

    def positions(self, rows: slice, keys: slice) -> Tensor:
        """Positional keys (d', queries + keys - 1) of a block."""
        t = len(self.q)
        return self.r[:, t - rows.stop + keys.start : t - rows.start + keys.stop - 1]

    def scores(self, rows: slice, keys: slice) -> Tensor:
        """Scores (queries, keys) of a block, before masks."""
        scores = product_t(self.q[rows], self.k[keys])
        if self.p is None or self.r is None:
            return scores
        by_offset = self.p[rows] @ self.positions(rows, keys)
        return scores.add_(relative_to_absolute(by_offset, scores.size(1)))

    def masks(self, rows: slice, keys: slice) -> list[Tensor]:
        """What is masked of a block."""
        masks = [] if self.padding is None else [self.padding[keys]]
        if self.seen is not None:
            key = torch.arange(keys.start, keys.stop, device=self.seen.device)
            begin, behind = self.seen[rows, None].unbind(-1)
            masks.append((key < begin) | (key >= behind))
        return masks

    def weights(self, rows: slice, keys: slice) -> Tensor:
        """Weights (queries, keys) of a block."""
        scores = self.scores(rows, keys)
        for mask in self.masks(rows, keys):
            scores.masked_fill_(mask, MASKED_SCORE)
        return torch.softmax(scores, dim=-1, out=scores)


def _heads(inputs: Inputs, count: int) -> Iterator[tuple[int, int, _Head]]:
    """Utterance, head, and what its weights are computed from."""
    q, k, p, r, padding, seen = inputs
    for b, mask in enumerate(padding):
        frames = int((~mask).sum())
        for h in range(count):
            yield (
                b,
                h,
                _Head(
                    q[b, h].float().contiguous(),
                    k[b, h].float().contiguous(),
                    None if p is None else p[b, h].float().contiguous(),
                    None if r is None else r[h].float().contiguous(),
                    mask if frames < len(mask) else None,
                    frames,
                    seen,
                ),
            )


def _apply(inputs: Inputs, v: Tensor) -> Tensor:
    """Weighted sums (B, h, T, d) of values (B, h, S, d) of the first h heads."""
    out = v.new_empty(*v.shape[:2], inputs.q.size(2), v.size(3))
    with torch.autocast(v.device.type, enabled=False):
        for b, h, head in _heads(inputs, v.size(1)):
            values = v[b, h].float().t().contiguous()
            for rows, keys in head.blocks():
                # oneDNN is many times slower on a part of longer rows.
                part = values[:, keys].contiguous()
                out[b, h, rows] = product_t(head.weights(rows, keys), part)
    return out


class _Start(torch.autograd.Function):
    """An empty tensor that stands for the weights in the graph of autograd."""

    @staticmethod
    def forward(ctx, q, k, p, r, padding, seen, penalize, uses) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.penalize, ctx.uses = penalize, uses
        ctx.save_for_backward(q, k, p, r, padding, seen)
        return q.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, uses = Inputs(*ctx.saved_tensors), ctx.uses.take()
        grads = [None if x is None else torch.zeros_like(x) for x in inputs[:4]]
        gq, gk, gp, gr = grads
        with torch.autocast(inputs.q.device.type, enabled=False):
            for b, h, head in _heads(inputs, inputs.q.size(1)):
                mine = [(g[b, h], v[b, h]) for g, v in uses if h < g.size(1)]
                of_q, of_k, of_p, of_r = _head_backward(head, mine, ctx.penalize)
                gq[b, h], gk[b, h] = of_q, of_k
                if gp is not None and gr is not None:
                    gp[b, h] = of_p
                    gr[h] += of_r
        return *grads, None, None, None, None


def _head_backward(
    head: _Head, uses: list[tuple[Tensor, Tensor]], penalize: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, p and r of a head.

    Args:
        head: it.
        uses: (gradient of the result (T, d), values (S, d)) of each.
        penalize: whether large scores are penalised.
    """
    gq, gk = torch.empty_like(head.q), torch.zeros_like(head.k.t())
    gp = None if head.p is None else torch.empty_like(head.p)
    gr = None if head.r is None else torch.zeros_like(head.r)
    uses = [(g.float().contiguous(), v.float().contiguous()) for g, v in uses]
    turned_k, around = head.k.t().contiguous(), None
    for rows, keys in head.blocks(whole=penalize):
        weights = head.weights(rows, keys)
        part = torch.zeros_like(weights)
        for g, v in uses:
            part += product_t(g[rows], v[keys])
        part.mul_(weights)  # the gradient of softmax
        part.addcmul_(weights, part.sum(dim=1, keepdim=True), value=-1)
        del weights
        for mask in head.masks(rows, keys):
            part.masked_fill_(mask, 0.0)
        if penalize:
            add_penalty_(part, head.scores(rows, keys))
        gq[rows] = product_t(part, turned_k[:, keys].contiguous())
        gk[:, keys] += product_t(head.q[rows].t(), part.t())
        if head.p is None or head.r is None:
            continue
        n, s = part.shape
        if around is None or around.shape != (n, n + s - 1):
            around = part.new_zeros(n, n + s - 1)
        relative_to_absolute(around, s).copy_(part)  # around it stay zeros
        positions = head.positions(rows, keys)
        gp[rows] = around @ positions.t()  # oneDNN is slow at four columns
        first = len(head.q) - rows.stop + keys.start
        gr[:, first : first + n + s - 1] += head.p[rows].t() @ around
    return gq, gk.t(), gp, gr


class _ApplyInBlocks(torch.autograd.Function):
    """Weighted sums; leaves the gradient of the weights to :class:`_Start`."""

    @staticmethod
    def forward(ctx, start: Tensor, v: Tensor, uses: Uses, *inputs) -> Tensor:
        ctx.save_for_backward(v, *inputs)
        ctx.uses = uses
        return _apply(Inputs(*inputs), v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, *tensors = ctx.saved_tensors
        ctx.uses.add(grad, v)
        gv = torch.empty_like(v)
        with torch.autocast(v.device.type, enabled=False):
            for b, h, head in _heads(Inputs(*tensors), v.size(1)):
                g = grad[b, h].float().t().contiguous()
                of_v = g.new_zeros(v.size(3), v.size(2))
                for rows, keys in head.blocks():
                    weights = head.weights(rows, keys)
                    part = g[:, rows].contiguous()
                    of_v[:, keys] += product_t(part, weights.t())
                gv[b, h] = of_v.t()
        return None, gv, None, *[None] * len(tensors)


class BlockedAttention:
    """Attention whose weights are never held at once.

    Args:
        inputs: what the weights are computed from.
        penalize: whether scores beyond their limit get a gradient that shrinks them.
    """

    def __init__(self, inputs: Inputs, penalize: bool) -> None:
        self.inputs = inputs
        self.uses = Uses()
        self.start = None
        if torch.is_grad_enabled():
            self.start = _Start.apply(*inputs, penalize, self.uses)

    def apply(self, v: Tensor) -> Tensor:
        """Weighted sums (B, h, T, d) of values (B, h, S, d) of the first h heads."""
        if self.start is None:
            return _apply(self.inputs, v)
        return _ApplyInBlocks.apply(self.start, v, self.uses, *self.inputs)

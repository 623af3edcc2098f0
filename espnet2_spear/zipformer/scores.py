"""Attention scores with relative positions, and weights, in blocks of queries.

The weights of an utterance of T frames, (H, T, T), are the largest tensors of the
stacks. A block of them is the same numbers, and on a CPU a block with all that it is
computed from stays in the caches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from espnet2_spear.zipformer.regularizers import penalize_large

MASKED_SCORE = -1000.0  # finite, as in the reference: rows of padding stay finite
SCORE_LIMIT, SCORE_PENALTY = 25.0, 1.0e-4
BLOCK = 2**21  # weights of a block


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
        seen: (T, 2) first key that a query sees, and the first behind the last;
            None: all are seen.
    """

    q: Tensor
    k: Tensor
    p: Tensor | None
    r: Tensor | None
    padding: Tensor
    seen: Tensor | None

    def blocks(self) -> list[tuple[int, int]]:
        """Ranges of queries that are computed at once."""
        b, h, t, _ = self.q.shape
        size = max(8, BLOCK // max(1, b * h * self.k.size(2)))
        return [(i, min(i + size, t)) for i in range(0, t, size)]

    def masks(self, start: int, end: int) -> list[Tensor]:
        """What is masked of these queries' scores."""
        masks = [self.padding[:, None, None, :]]
        if self.seen is not None:
            key = torch.arange(self.k.size(2), device=self.seen.device)
            begin, behind = self.seen[start:end, None].unbind(-1)
            masks.append((key < begin) | (key >= behind))
        return masks

    def scores(self, start: int, end: int) -> Tensor:
        """Scores (B, H, queries, S) of a block of queries, before masks."""
        q, k = self.q[:, :, start:end], self.k
        b, h, n, d = q.shape
        q, k = q.reshape(b * h, n, d), k.reshape(b * h, -1, d).transpose(1, 2)
        if self.p is None or self.r is None:
            return torch.bmm(q, k).view(b, h, n, -1)
        by_offset = torch.matmul(self.p[:, :, start:end], self.positions(start, end))
        by_key = relative_to_absolute(by_offset.view(b * h, n, -1), k.size(2))
        return torch.baddbmm(by_key, q, k).view(b, h, n, -1)

    def positions(self, start: int, end: int) -> Tensor:
        """Positional keys (H, d', end - start + S - 1) of a block of queries."""
        t, s = self.q.size(2), self.k.size(2)
        return self.r[..., t - end : t - start + s - 1]

    def weights(self, start: int, end: int) -> Tensor:
        """Weights (B, H, queries, S) of a block of queries, float32."""
        scores = self.scores(start, end)
        for mask in self.masks(start, end):
            scores.masked_fill_(mask, MASKED_SCORE)
        return scores.softmax(dim=-1, dtype=torch.float32)

    def all_weights(self) -> Tensor:
        """Weights (B, H, T, S), float32."""
        b, h, t, _ = self.q.shape
        weights = self.q.new_empty(b, h, t, self.k.size(2))
        for start, end in self.blocks():
            weights[:, :, start:end] = self.weights(start, end)
        return weights


class Uses:
    """What the uses of some weights hand over in one backward pass.

    The gradient of the weights is the sum of the products of these pairs. A pass that
    asks for some gradients only may leave pairs that the next one must not count.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._pass = -1

    def add(self, grad: Tensor, values: Tensor) -> None:
        """Hand over the gradient of a result and the values that were weighed."""
        now = torch._C._current_graph_task_id()
        if now != self._pass:
            self._pairs, self._pass = [], now
        self._pairs.append((grad, values))

    def take(self) -> list[tuple[Tensor, Tensor]]:
        """Return the pairs of this pass, and forget them."""
        pairs, self._pairs = self._pairs, []
        return pairs if self._pass == torch._C._current_graph_task_id() else []


def penalize(scores: Tensor) -> Tensor:
    """Return scores; those beyond the limit get a gradient that shrinks them."""
    return penalize_large(scores, SCORE_LIMIT, SCORE_PENALTY)


def add_penalty_(grad: Tensor, scores: Tensor) -> Tensor:
    """Add to the gradient of scores, in place, what :func:`penalize` adds."""
    grad.add_(scores > SCORE_LIMIT, alpha=SCORE_PENALTY)
    return grad.add_(scores < -SCORE_LIMIT, alpha=-SCORE_PENALTY)

"""Attention weights with relative positions (Zipformer, arXiv 2310.11230, 3.2).

weights = softmax(q k + p r): queries q, keys k, positional queries p and positional
keys r, which are a linear map of the encoded distance between query and key. The
weights of a layer are computed once and applied to values three times. Those of long
utterances are the largest tensors of the network (8 heads of 30 000 frames: 27 GiB):
there a block of queries exists at a time, every use computes the weights again, and
so does its backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from espnet2_spear.zipformer.fusion import replaceable
from espnet2_spear.zipformer.regularizers import penalize_large

MASKED_SCORE = -1000.0  # finite, as in the reference: rows of padding stay finite
SCORE_LIMIT = 25.0
# Weights of an utterance (all heads) from which on they are computed in blocks, and
# weights of a block (all utterances and heads).
MAX_WEIGHTS, BLOCK_WEIGHTS, MIN_QUERIES = 2**25, 2**27, 8


def relative_to_absolute(scores: Tensor, keys: int) -> Tensor:
    """Turn scores by offset into scores by key position, without copying.

    Args:
        scores: (..., Q, Q + keys - 1), last axis = key - query + Q - 1, in positions;
            contiguous.
        keys: number of keys.

    Returns:
        (..., Q, keys) view, last axis = key.
    """
    queries, offsets = scores.shape[-2:]
    if torch.compiler.is_compiling():  # a graph must hold for any length
        query = torch.arange(queries, device=scores.device)[:, None]
        key = torch.arange(keys, device=scores.device)
        index = query * (offsets - 1) + queries - 1 + key
        picked = scores.flatten(-2).index_select(-1, index.flatten())
        return picked.unflatten(-1, (queries, keys))
    if queries == 1:
        return scores
    # A row begins one element earlier than the row above it.
    flat = scores.flatten(-2).narrow(-1, queries - 1, queries * (offsets - 1))
    return flat.unflatten(-1, (queries, offsets - 1))[..., :keys]


class Inputs(NamedTuple):
    """Inputs of attention weights.

    Attributes:
        q: (B, H, T, d) queries.
        k: (B, H, S, d) keys.
        p: (B, H, T, d') positional queries; None: no positional term.
        r: (H, d', T + S - 1) positional keys, by key - query + T - 1.
        padding: (B, S) bool, True: no query sees this key.
        seen: (T, 2) range [begin, end) of the keys that a query sees; None: all.
    """

    q: Tensor
    k: Tensor
    p: Tensor | None
    r: Tensor | None
    padding: Tensor
    seen: Tensor | None

    def first_heads(self, count: int) -> Inputs:
        """Return the same of the first heads only."""
        q, k, p, r = self.q[:, :count], self.k[:, :count], self.p, self.r
        if p is not None and r is not None:
            p, r = p[:, :count], r[:count]
        return Inputs(q, k, p, r, self.padding, self.seen)

    def scores(self, start: int, end: int) -> Tensor:
        """Scores (B, H, queries, S) of queries start to end, before masks."""
        (b, h, t, d), s, n = self.q.shape, self.k.size(2), end - start
        q = self.q[:, :, start:end].reshape(b * h, n, d)
        k = self.k.reshape(b * h, s, d).transpose(1, 2)
        if self.p is None or self.r is None:
            return torch.bmm(q, k).view(b, h, n, s)
        positions = self.r[..., t - end : t - start + s - 1]
        by_offset = torch.matmul(self.p[:, :, start:end], positions)
        by_key = relative_to_absolute(by_offset.view(b * h, n, n + s - 1), s)
        return torch.baddbmm(by_key, q, k).view(b, h, n, s)

    def masks(self, start: int, end: int) -> list[Tensor]:
        """Masks of these queries' scores."""
        masks = [self.padding[:, None, None, :]]
        if self.seen is not None:
            key = torch.arange(self.k.size(2), device=self.seen.device)
            begin, behind = self.seen[start:end, None].unbind(-1)
            masks.append((key < begin) | (key >= behind))
        return masks

    def weights(self, start: int, end: int, penalty: float = 0.0) -> Tensor:
        """Weights (B, H, queries, S) of queries start to end; softmax is float32.

        Args:
            start, end: the queries.
            penalty: gradient that shrinks scores beyond +-25; 0: none.
        """
        scores = self.scores(start, end)
        if penalty:
            scores = penalize_large(scores, SCORE_LIMIT, penalty)
        for mask in self.masks(start, end):
            scores = scores.masked_fill(mask, MASKED_SCORE)
        return scores.softmax(dim=-1, dtype=torch.float32).to(self.q.dtype)


class Attention:
    """Attention weights of a layer, ready to be applied to values.

    Args:
        inputs: queries, keys, positions and masks.
        penalty: gradient that shrinks scores beyond +-25; 0: none.

    Attributes:
        weights: (B, H, T, S), rows (queries) sum to 1; None: computed in blocks.
    """

    def __init__(self, inputs: Inputs, penalty: float = 0.0) -> None:
        self.inputs = inputs
        self.penalty = penalty
        self.weights = None
        if not in_blocks(inputs.q, inputs.k):
            self.weights = inputs.weights(0, inputs.q.size(2), penalty)

    def apply(self, v: Tensor) -> Tensor:
        """Weighted sums (B, h, T, d) of values (B, h, S, d) of the first h heads."""
        heads = v.size(1)
        if self.weights is not None:
            return torch.matmul(self.weights[:, :heads], v)
        penalty = 0.0
        if heads == self.inputs.q.size(1):  # the first use of all heads adds it
            penalty, self.penalty = self.penalty, 0.0
        return apply_in_blocks(v, self.inputs.first_heads(heads), penalty)


@replaceable
def in_blocks(q: Tensor, k: Tensor) -> bool:
    """Whether the weights of queries (B, H, T, d) and keys (B, H, S, d) are too many.

    The memory of an utterance decides: of a batch, whoever chose its size did.
    """
    if torch.compiler.is_compiling():
        return False  # a graph must hold for any length
    return q.size(1) * q.size(2) * k.size(2) > MAX_WEIGHTS


@replaceable
def apply_in_blocks(v: Tensor, inputs: Inputs, penalty: float) -> Tensor:
    """Weighted sums (B, h, T, d) of values (B, h, S, d), in blocks of queries.

    A block is one of all utterances and heads at once.
    """
    b, h, s, _ = v.shape
    frames = inputs.q.size(2)
    size = max(MIN_QUERIES, BLOCK_WEIGHTS // (b * h * s))

    def block(v: Tensor, start: int, end: int) -> Tensor:
        return torch.matmul(inputs.weights(start, end, penalty), v)

    parts = [
        checkpoint(
            block,
            v,
            start,
            min(start + size, frames),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for start in range(0, frames, size)
    ]
    return torch.cat(parts, dim=2)

"""Linear classifiers of many codebooks and their cross-entropy, a chunk at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits that exist at once (float32: 4 bytes each). A CPU's caches prefer few; a GPU
# wants matrix products that are large enough to be fast.
CHUNK_LOGITS = {"cpu": 2**20, "other": 2**25}
# Where shapes may depend on values: the host need not wait for the device there.
HOST = ("cpu",)


class CodebookLoss(NamedTuple):
    """Loss of one head, and what statistics need.

    Attributes:
        loss: () sum over frames of weight times mean over codebooks of the
            cross-entropy; the only one that has a gradient.
        entropy: (M, N) float32 cross-entropy of every entry, 0 where ignored.
        correct: (M, N) bool, whether the most likely code is the target.
    """

    loss: Tensor
    entropy: Tensor
    correct: Tensor


def codebook_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    frame_weight: Tensor,
    chunk_rows: int | None = None,
) -> CodebookLoss:
    """Cross-entropy of N codebooks of K codes predicted by one linear layer.

    The logits of a few frames at a time are computed, turned into their own gradient
    in place, multiplied out and forgotten, all in the forward pass, because the
    gradient of the loss with respect to them is known there up to a factor. Of M N K
    logits nothing is kept; the backward pass multiplies the kept gradients (M D and
    N K D numbers) by that factor. The matrix products are those of the plain version:
    one forward, two backward.

    Products are computed in autocast's type where autocast is on, everything else in
    float32 (float64 for a float64 ``hidden``), sums over chunks included. Frames
    without a target cost nothing on a CPU; elsewhere they are computed as well, since
    to leave them out the host would have to wait for the device.

    ``torch.compile`` does not look into this function.

    Args:
        hidden: (M, D) float, frames.
        weight: (N K, D) of the linear layer, codebook-major.
        bias: (N K,).
        targets: (M, N) int in 0..K-1; negative entries are ignored: they add 0, but
            count in the mean over codebooks.
        frame_weight: (M,) float, at least 0; has no gradient.
        chunk_rows: frames at a time; by default as ``CHUNK_LOGITS`` says.

    Raises:
        ValueError: sizes that do not fit together.
    """
    if weight.size(0) % targets.size(1) or targets.size(0) != hidden.size(0):
        raise ValueError(
            f"{tuple(hidden.shape)} frames, {tuple(targets.shape)} targets and a layer "
            f"of {weight.size(0)} outputs do not fit together"
        )
    if chunk_rows is None:
        logits = CHUNK_LOGITS.get(hidden.device.type, CHUNK_LOGITS["other"])
        chunk_rows = max(1, logits // weight.size(0))
    outputs = _eager()(
        hidden,
        weight,
        bias,
        targets,
        frame_weight,
        chunk_rows,
        torch.is_grad_enabled(),  # inside the function it never is
    )
    return CodebookLoss(*outputs)


@functools.cache
def _eager() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The function behind a graph break; made at its first use, for it is slow to."""
    return torch.compiler.disable(_CodebookLoss.apply)


class _CodebookLoss(torch.autograd.Function):
    """See :func:`codebook_loss`."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        frame_weight: Tensor,
        chunk_rows: int,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind = hidden.device.type
        dtype = hidden.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(kind, enabled=False):
            # Relative to the largest, so that 16-bit gradients do not underflow.
            largest = frame_weight.max().clamp(min=torch.finfo(exact).tiny)
            chunks = _Chunks(
                hidden, weight.to(dtype), bias.to(dtype), targets, dtype, exact
            )
            entropy, correct, gradients = chunks.run(
                (frame_weight / largest).to(exact), chunk_rows, with_gradient
            )
            num_codebooks = targets.size(1)
            loss = torch.dot(entropy.sum(dim=1), frame_weight.to(exact)) / num_codebooks
        if with_gradient:
            ctx.save_for_backward(largest / num_codebooks, *gradients)
            ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype
        ctx.mark_non_differentiable(entropy, correct)
        return loss, entropy, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        factor, *gradients = ctx.saved_tensors
        factor = factor * grad_loss
        gradients = [
            (gradient * factor).to(dtype) if needed else None
            for gradient, dtype, needed in zip(
                gradients, ctx.dtypes, ctx.needs_input_grad, strict=False
            )
        ]
        return (*gradients, None, None, None, None)


class _Chunks:
    """The loop over chunks of frames."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        exact: torch.dtype,
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.targets = targets
        self.dtype, self.exact = dtype, exact
        self.size = weight.size(0) // targets.size(1)

    def run(
        self, frame_weight: Tensor, chunk_rows: int, with_gradient: bool
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return entropy, correctness and the gradients of hidden, weight and bias.

        The gradients are those of the sum over codebooks, not of the mean.
        """
        hidden, weight, exact = self.hidden, self.weight, self.exact
        entropy = hidden.new_zeros(self.targets.shape, dtype=exact)
        correct = torch.zeros_like(self.targets, dtype=torch.bool)
        gradients: tuple[Tensor, ...] = ()
        if with_gradient:
            gradients = (
                torch.zeros_like(hidden),
                torch.zeros_like(weight, dtype=exact),
                torch.zeros_like(self.bias, dtype=exact),
            )
        for rows in self._rows(chunk_rows):
            x, target = hidden[rows].to(self.dtype), self.targets[rows]
            logits = F.linear(x, weight, self.bias).to(exact)
            logits = logits.unflatten(1, (-1, self.size))
            known = target >= 0
            index = target.clamp(min=0).long()[..., None]
            top, best = logits.max(dim=-1)
            own = logits.gather(-1, index)[..., 0]
            exps = logits.sub_(top[..., None]).exp_()
            total = exps.sum(dim=-1)
            entropy[rows] = (total.log() + top - own).masked_fill(~known, 0.0)
            correct[rows] = best == target
            if not with_gradient:
                continue
            # softmax - 1 at the target, times the frame's weight; 0 where ignored
            scale = frame_weight[rows, None] * known
            grad = exps.mul_((scale / total)[..., None])
            grad = grad.scatter_add_(-1, index, -scale[..., None]).flatten(1)
            grad_hidden, grad_weight, grad_bias = gradients
            grad_bias += grad.sum(dim=0)
            grad = grad.to(self.dtype)
            grad_hidden[rows] = (grad @ weight).to(hidden.dtype)
            if self.dtype == exact:
                grad_weight.addmm_(grad.T, x)
            else:
                grad_weight += grad.T @ x
        return entropy, correct, gradients

    def _rows(self, chunk_rows: int) -> list[slice] | tuple[Tensor, ...]:
        """Indexes of the frames of each chunk."""
        frames = self.hidden.size(0)
        if self.hidden.device.type in HOST:
            with_target = (self.targets >= 0).any(dim=1)
            if not bool(with_target.all()):
                return with_target.nonzero()[:, 0].split(chunk_rows)
        return [slice(i, i + chunk_rows) for i in range(0, frames, chunk_rows)]

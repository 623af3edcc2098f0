"""Linear classifiers of many codebooks and their cross-entropy, a chunk at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# ------------------------------------------------------------
# Which teacher's codes are predicted on which domain, and with what weight.


LossWeights = str | Mapping[str, Any]

PRESETS = ("joint", "disjoint", "asymmetric")
DEFAULT_PRESET = "asymmetric"  # of the published models
MAIN_WEIGHT, OTHER_WEIGHT = 1.0, 0.1  # lambda of the published models


def preset_table(
    preset: str,
    domains: Sequence[str],
    teachers: Sequence[str],
    main: str | None = None,
    weights: Mapping[str, float] | None = None,
) -> dict[str, dict[str, float]]:
    """Write out one of the three tables that the paper compares.

    A teacher's own domain is the one of its name.

    Args:
        preset: ``joint``: every teacher on every domain; ``disjoint``: every teacher
            on its own domain only; ``asymmetric``: the main teacher on every domain,
            the others on their own.
        domains: names of the domains.
        teachers: names of the teachers.
        main: the main teacher; by default the first.
        weights: teacher -> weight wherever it is used; by default 1 for the main one
            and 0.1 for the others.

    Returns:
        domain -> teacher -> weight.

    Raises:
        ValueError: an unknown preset or teacher, a teacher without a domain of its
            name where one is needed, or a domain that no teacher would serve.
    """
    if preset not in PRESETS:
        raise ValueError(f"loss_weights '{preset}': one of {', '.join(PRESETS)}")
    main = teachers[0] if main is None else main
    weights = dict(weights or {})
    for name in {main, *weights} - set(teachers):
        raise ValueError(f"loss_weights: unknown teacher '{name}' of {list(teachers)}")
    for name in teachers:
        alone = preset == "disjoint" or (preset == "asymmetric" and name != main)
        if alone and name not in domains:
            raise ValueError(
                f"loss_weights '{preset}': teacher '{name}' needs a domain of its "
                f"name, the domains are {list(domains)}; rename it or write a table"
            )
    table = {}
    for domain in domains:
        table[domain] = {
            name: float(
                weights.get(name, MAIN_WEIGHT if name == main else OTHER_WEIGHT)
            )
            for name in teachers
            if preset == "joint"
            or name == domain
            or (preset == "asymmetric" and name == main)
        }
        if not table[domain]:
            raise ValueError(
                f"loss_weights '{preset}': no teacher for domain '{domain}'"
            )
    return table


def resolve_loss_weights(
    loss_weights: LossWeights, domains: Sequence[str], teachers: Sequence[str]
) -> Mapping[str, Mapping[str, float]]:
    """Turn the option into a table, domain -> teacher -> weight.

    Args:
        loss_weights: the name of a preset; or ``{preset: NAME, main: TEACHER,
            weights: {TEACHER: WEIGHT}}``, see :func:`preset_table`; or a table.
        domains: names of the domains.
        teachers: names of the teachers.

    Raises:
        ValueError: see :func:`preset_table`; or no such option.
    """
    if isinstance(loss_weights, str):
        loss_weights = {"preset": loss_weights}
    if not isinstance(loss_weights, Mapping):
        raise ValueError(
            f"loss_weights {loss_weights!r}: expected domain -> teacher -> weight, or "
            f"one of {', '.join(PRESETS)}"
        )
    if not isinstance(loss_weights.get("preset"), str):
        return _checked_table(loss_weights)
    if unknown := [k for k in loss_weights if k not in ("preset", "main", "weights")]:
        raise ValueError(
            f"loss_weights: {unknown} beside preset, which takes main and weights; "
            "options of a command line are added to the table of a YAML file: name "
            "the preset there"
        )
    weights = loss_weights.get("weights") or {}
    loss_weights = {**loss_weights, "weights": _checked_row("weights", weights)}
    return preset_table(domains=domains, teachers=teachers, **loss_weights)


def _checked_table(table: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {domain: _checked_row(domain, row) for domain, row in table.items()}


def _checked_row(name: str, row: Any) -> dict[str, float]:
    if not isinstance(row, Mapping):
        raise ValueError(f"loss_weights.{name} {row!r}: expected teacher -> weight")
    for teacher, weight in row.items():
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not (number and math.isfinite(weight) and weight >= 0):
            raise ValueError(
                f"loss_weights.{name}.{teacher} {weight!r}: expected a number, 0 or "
                "more"
            )
    return dict(row)


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


# ------------------------------------------------------------
# Prediction heads: one linear classifier per codebook.


class CodebookHead(nn.Linear):
    """N classifiers of K codes each, as one linear layer.

    Args:
        dim: channels D of the frames.
        num_codebooks: N.
        codebook_size: K.
    """

    def __init__(self, dim: int, num_codebooks: int, codebook_size: int) -> None:
        super().__init__(dim, num_codebooks * codebook_size)
        self.codebook_size = codebook_size

    def forward(
        self, hidden: Tensor, targets: Tensor, frame_weight: Tensor
    ) -> CodebookLoss:
        """Loss of frames (M, D); see :func:`codebook_loss`.

        Through the module, not through its tensors, so that whatever keeps parameters
        elsewhere (DeepSpeed, FSDP) brings them in time.

        Args:
            hidden: (M, D).
            targets: (M, N) int, negative = ignored.
            frame_weight: (M,) float.
        """
        return codebook_loss(hidden, self.weight, self.bias, targets, frame_weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., N, K) of frames (..., D): not for whole batches."""
        return super().forward(hidden).unflatten(-1, (-1, self.codebook_size))


# ------------------------------------------------------------
# Sums and counts behind the statistics of a step.


class StatSums:
    """Collects numerators and denominators, averaged over all ranks at once.

    ESPnet averages statistics over ranks with the batch's weight and needs the
    same keys everywhere; a rank without an utterance of a domain would spoil or
    bias that domain's figures. Sums over ranks are exact.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: list[Tensor] = []

    def add(self, names: Sequence[str], totals: Tensor, counts: Tensor) -> None:
        """Remember totals / counts, both (len(names),), under these names."""
        self._names += names
        self._sums.append(torch.stack([totals.detach().float(), counts.float()]))

    def averages(self) -> dict[str, Tensor]:
        """Return name -> average; nan (which the reporter skips) without a count."""
        if not self._sums:
            return {}
        sums = torch.cat(self._sums, dim=1)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        return dict(zip(self._names, (sums[0] / sums[1]).unbind(), strict=True))


def code_statistics(
    result: CodebookLoss, known: Tensor, masked: Tensor, member: Tensor, groups: int
) -> tuple[list[str], Tensor, Tensor]:
    """Sums behind loss and accuracies of one head, for several sets of frames.

    Args:
        result: of M frames and N codebooks.
        known: (M, N) bool, entries that have a target.
        masked: (M,) bool, frames that were masked.
        member: (M, S) bool, which of S sets each frame belongs to.
        groups: accuracy is also given for so many groups of neighbouring codebooks.

    Returns:
        names (without a prefix) of F figures, and the numerators and denominators of
        each, (S, F) float32.
    """
    known, correct = known.float(), result.correct.float()
    hits, count = correct.sum(dim=1), known.sum(dim=1)
    names = ["loss", "acc_masked", "acc_unmasked"]
    names += [f"acc_group{g}" for g in range(groups)]
    totals = [result.entropy.float().sum(dim=1), hits * masked, hits * ~masked]
    totals += [part.sum(dim=1) for part in correct.tensor_split(groups, dim=1)]
    counts = [count, count * masked, count * ~masked]
    counts += [part.sum(dim=1) for part in known.tensor_split(groups, dim=1)]
    # Not a matrix product: those may round their factors (TF32).
    weight = member.float()[:, :, None]
    totals, counts = (
        (weight * torch.stack(values, dim=1)[:, None]).sum(dim=0)
        for values in (totals, counts)
    )
    return names, totals, counts

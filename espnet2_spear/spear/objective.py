"""The objective of pre-training: asymmetric masked prediction of multi-codebook tokens.

The objective of arXiv 2510.25955, as the authors' scripts compute it [5.2, 5.3], for an
utterance of domain d with student frames h_t:

    L = sum over teachers m of  v[d, m]  sum over frames t of  w_t / N_m
            sum over codebooks n of  -log softmax(W_{m,n} h_t + b_{m,n}) [i_{m,t,n}]

i are the teacher's N_m codes of the frame; entries without a code add 0 but count in
N_m. w_t is the weight of masked or of unmasked frames (both 1 in the authors' scripts:
the loss is taken on all frames). v is the asymmetric table: the speech teacher's codes
are targets on speech and on audio, with weight 1; the audio teacher's on audio alone,
with lambda = 0.1.

In the order of this file: the tables v (``PRESETS``), the heads W, b and their loss
(``CodebookHead``, ``codebook_loss``), and the statistics of a step (``StatSums``). The
sum over teachers is in ``model.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LossWeights = str | Mapping[str, Any]

# The tables that the paper compares: is a teacher's loss taken on a domain?
# A teacher's own domain is the one of its name.
PRESETS: Mapping[str, Callable[[str, str, str], bool]] = {
    "joint": lambda teacher, domain, main: True,
    "disjoint": lambda teacher, domain, main: teacher == domain,
    "asymmetric": lambda teacher, domain, main: teacher in (domain, main),
}
DEFAULT_PRESET = "asymmetric"  # of the published models
MAIN_WEIGHT, OTHER_WEIGHT = 1.0, 0.1  # lambda of the published models


def resolve_loss_weights(
    option: LossWeights, domains: Sequence[str], teachers: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Turn the option ``--loss_weights`` into a table.

    Args:
        option: the name of a preset; or ``{preset: NAME, main: TEACHER, weights:
            {TEACHER: WEIGHT}}``, by default with the first teacher as the main one, of
            weight 1, and 0.1 for the others; or a table as it is.
        domains: names of the domains.
        teachers: names of the teachers.

    Returns:
        domain -> teacher -> weight; absent pairs have no loss.

    Raises:
        ValueError: no such option, unknown names, weights that are not numbers of at
            least 0, a teacher that no domain uses, or, for a preset, a domain without
            teacher or a teacher without the domain of its name where it needs one.
    """
    if isinstance(option, str):
        option = {"preset": option}
    if not isinstance(option, Mapping):
        raise ValueError(
            f"loss_weights {option!r}: expected domain -> teacher -> weight, or one of "
            f"{', '.join(PRESETS)}"
        )
    if isinstance(option.get("preset"), str):
        table = _preset_table(option, domains, teachers)
    else:
        table = {
            name: _checked_row(name, row, teachers) for name, row in option.items()
        }
    for name in set(table) - set(domains):
        raise ValueError(f"loss_weights: unknown domain '{name}' of {list(domains)}")
    for name in teachers:
        if not any(row.get(name, 0.0) > 0 for row in table.values()):
            raise ValueError(
                f"loss_weights: no domain uses the teacher '{name}': give it a weight "
                "or remove it"
            )
    return table


def _preset_table(
    option: Mapping[str, Any], domains: Sequence[str], teachers: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Write a preset out; see :func:`resolve_loss_weights`."""
    if unknown := [k for k in option if k not in ("preset", "main", "weights")]:
        raise ValueError(
            f"loss_weights: {unknown} beside preset, which takes main and weights; "
            "options of a command line are added to the table of a YAML file: name "
            "the preset there"
        )
    preset, main = option["preset"], option.get("main", teachers[0])
    if preset not in PRESETS:
        raise ValueError(f"loss_weights '{preset}': one of {', '.join(PRESETS)}")
    if main not in teachers:
        raise ValueError(f"loss_weights: unknown teacher '{main}' of {list(teachers)}")
    weights = dict.fromkeys(teachers, OTHER_WEIGHT) | {main: MAIN_WEIGHT}
    weights |= _checked_row("weights", option.get("weights") or {}, teachers)
    uses = PRESETS[preset]
    for name in teachers:
        if not any(uses(name, domain, main) for domain in domains):
            raise ValueError(
                f"loss_weights '{preset}': teacher '{name}' needs a domain of its "
                f"name, the domains are {list(domains)}; rename it or write a table"
            )
    table = {
        domain: {name: weights[name] for name in teachers if uses(name, domain, main)}
        for domain in domains
    }
    for domain, row in table.items():
        if not row:
            raise ValueError(
                f"loss_weights '{preset}': no teacher for domain '{domain}'"
            )
    return table


def _checked_row(name: str, row: Any, teachers: Sequence[str]) -> dict[str, float]:
    if not isinstance(row, Mapping):
        raise ValueError(f"loss_weights.{name} {row!r}: expected teacher -> weight")
    for teacher, weight in row.items():
        if teacher not in teachers:
            raise ValueError(
                f"loss_weights.{name}: unknown teacher '{teacher}' of {list(teachers)}"
            )
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not (number and math.isfinite(weight) and weight >= 0):
            raise ValueError(
                f"loss_weights.{name}.{teacher} {weight!r}: expected a number, 0 or "
                "more"
            )
    return {teacher: float(weight) for teacher, weight in row.items()}


# Logits that exist at once (float32: 4 bytes each). A CPU's caches prefer few; a GPU
# wants matrix products that are large enough to be fast.
CHUNK_LOGITS = {"cpu": 2**20, "other": 2**25}
# Devices on which data-dependent shapes need no synchronisation with the host.
HOST = ("cpu",)
GROUPS = 4  # of neighbouring codebooks, whose accuracies are reported


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

    def forward(  # type: ignore[override]  # it takes the targets, too
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


def codebook_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    frame_weight: Tensor,
    chunk_rows: int | None = None,
) -> CodebookLoss:
    """Cross-entropy of N codebooks of K codes predicted by one linear layer.

    All M N K logits of a batch would need much memory (16 codebooks of 256: 16 KB a
    frame). The gradient of the loss with respect to them is known in the forward pass,
    up to the factor that the backward pass brings. So the logits of a few frames at a
    time are computed, turned into their own gradient in place, multiplied out and
    forgotten; M D and N K D numbers of gradient are kept. The matrix products are
    those of the plain version: one forward, two backward.

    All of it is in float32 (float64 for a float64 ``hidden``) whatever autocast says:
    bfloat16 would round a logit of 16 by up to 0.06. Frames without a target cost
    nothing on a CPU; elsewhere they are computed as well, since to leave them out the
    host would have to wait for the device. ``torch.compile`` does not look into this.

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
    with_gradient = torch.is_grad_enabled()  # inside the function it never is
    inputs = hidden, weight, bias, targets, frame_weight
    return CodebookLoss(*_eager()(*inputs, chunk_rows, with_gradient))


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
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        weight, bias = weight.to(dtype), bias.to(dtype)
        frame_weight = frame_weight.to(dtype) / targets.size(1)
        entropy = hidden.new_zeros(targets.shape, dtype=dtype)
        correct = torch.zeros_like(targets, dtype=torch.bool)
        if with_gradient:
            grad_hidden = torch.zeros_like(hidden, dtype=dtype)
            grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(targets, chunk_rows):
                x, target = hidden[rows].to(dtype), targets[rows]
                known = target >= 0
                index = target.clamp(min=0).long()[..., None]
                logits = F.linear(x, weight, bias).unflatten(1, (targets.size(1), -1))
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
                grad_hidden[rows] = grad @ weight
                grad_weight.addmm_(grad.T, x)
                grad_bias += grad.sum(dim=0)
            loss = torch.dot(entropy.sum(dim=1), frame_weight)
        if with_gradient:
            ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.mark_non_differentiable(entropy, correct)
        return loss, entropy, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            (gradient * grad_loss).to(dtype) if needed else None
            for gradient, dtype, needed in zip(
                ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False
            )
        ]
        return (*gradients, None, None, None, None)


def _chunks(targets: Tensor, chunk_rows: int) -> Iterable[slice | Tensor]:
    """Indexes of the frames (M,) of each chunk, of those with a target on a CPU."""
    if targets.device.type in HOST:
        with_target = (targets >= 0).any(dim=1)
        if not bool(with_target.all()):
            return with_target.nonzero()[:, 0].split(chunk_rows)
    frames = targets.size(0)
    return [slice(i, i + chunk_rows) for i in range(0, frames, chunk_rows)]


COUNT = "/count"


class StatSums:
    """Sums and counts behind the statistics of a step, over all ranks at once.

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
        """Return name -> average; nan (which the reporter skips) without a count.

        The counts have the same names with :data:`COUNT` behind them: averages of an
        epoch weigh those of its batches by them.
        """
        if not self._sums:
            return {}
        sums = torch.cat(self._sums, dim=1)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        averages = dict(zip(self._names, (sums[0] / sums[1]).unbind(), strict=True))
        counts = zip(self._names, sums[1].unbind(), strict=True)
        return averages | {name + COUNT: count for name, count in counts}


def code_statistics(
    result: CodebookLoss, known: Tensor, masked: Tensor, member: Tensor
) -> tuple[list[str], Tensor, Tensor]:
    """Sums behind loss and accuracies of one head, for several sets of frames.

    Args:
        result: of M frames and N codebooks.
        known: (M, N) bool, entries that have a target.
        masked: (M,) bool, frames that were masked.
        member: (M, S) bool, which of S sets each frame belongs to.

    Returns:
        names (without a prefix) of F figures, and the numerators and denominators of
        each, (S, F) float32.
    """
    known, correct = known.float(), result.correct.float()
    hits, count = correct.sum(dim=1), known.sum(dim=1)
    names = ["loss", "acc_masked", "acc_unmasked"]
    names += [f"acc_group{g}" for g in range(GROUPS)]
    totals = [result.entropy.float().sum(dim=1), hits * masked, hits * ~masked]
    totals += [part.sum(dim=1) for part in correct.tensor_split(GROUPS, dim=1)]
    counts = [count, count * masked, count * ~masked]
    counts += [part.sum(dim=1) for part in known.tensor_split(GROUPS, dim=1)]
    # Not a matrix product: those may round their factors (TF32).
    weight = member.float()[:, :, None]
    numerators, denominators = (
        (weight * torch.stack(values, dim=1)[:, None]).sum(dim=0)
        for values in (totals, counts)
    )
    return names, numerators, denominators

"""Gradients of one optimizer step: the exact mean over batches and ranks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.spear.model import SpearPretrainModel


@dataclass
class StepResult:
    """What a step's batches gave, still on the device.

    Attributes:
        stats: of each batch, averaged over ranks.
        weights: of each batch, summed over ranks.
        bad: of each batch, how many ranks had a loss that is not finite.
        bad_here: the same for this rank only, 0 or 1.
        forward_seconds: of each batch; what the host waited.
        backward_seconds: of each batch.
    """

    stats: list[dict[str, Tensor]] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    bad: list[Tensor] = field(default_factory=list)
    bad_here: list[Tensor] = field(default_factory=list)
    forward_seconds: list[float] = field(default_factory=list)
    backward_seconds: list[float] = field(default_factory=list)


def accumulate_gradients(
    model: nn.Module,
    batches: Sequence[dict[str, Any]],
    autocast: Callable[[], contextlib.AbstractContextManager],
    backward: Callable[[Tensor], None],
    before_batch: Callable[[int], None],
) -> StepResult:
    """Leave the gradient of sum_i(w_i loss_i) / sum_i(w_i) in the parameters.

    i runs over the batches of all ranks. The losses are divided by the weight of the
    first batches, which is known before the first backward pass, and the gradients
    are corrected by the weight of all when it is known: so they keep the size of a
    mean's gradients (float16 needs that), and nothing waits for the device.

    Args:
        model: returns (loss, stats, weight); wrapped in DistributedDataParallel if
            there is more than one rank. Its gradients are zero or None.
        batches: at least one, on the device; as many on each rank.
        autocast: context of the forward pass.
        backward: ``loss.backward()``, scaled or not.
        before_batch: called with the index of each batch before its forward pass.
    """
    result = StepResult()
    distributed = isinstance(model, DistributedDataParallel)
    ranks = torch.distributed.get_world_size() if distributed else 1
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with contextlib.nullcontext() if last or not distributed else model.no_sync():
            before_batch(index)
            start = time.perf_counter()
            with autocast():
                loss, weight = _forward(model, batch, result)
            if distributed or len(batches) > 1:
                # DDP's mean over ranks shall be a sum.
                share = weight.detach() * ranks / result.weights[0]
                loss = loss * share.to(loss.dtype)
            forward = time.perf_counter()
            backward(loss)
            result.forward_seconds.append(forward - start)
            result.backward_seconds.append(time.perf_counter() - forward)
    if len(batches) > 1:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        factor = result.weights[0] / torch.stack(result.weights).sum()
        torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
    return result


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batch: dict[str, Any],
    autocast: Callable[[], contextlib.AbstractContextManager],
) -> tuple[dict[str, float], float]:
    """Statistics of a batch, averaged over ranks, and the sum of its weights."""
    result = StepResult()
    with autocast():
        _forward(model, batch, result)
    values = torch.stack([*result.stats[0].values(), result.weights[0]]).tolist()
    return dict(zip(result.stats[0], values[:-1], strict=True)), values[-1]


def _forward(
    model: nn.Module, batch: dict[str, Any], result: StepResult
) -> tuple[Tensor, Tensor]:
    """Loss and weight as scalars; statistics, over all ranks, go to the result."""
    loss, stats, weight = model(**batch)
    # ESPnet's models return tensors of one element where DataParallel could gather.
    loss, weight = loss.reshape(()), weight.reshape(())
    _average_over_ranks(result, loss, stats, weight)
    return loss, weight


@torch.no_grad()
def _average_over_ranks(
    result: StepResult,
    loss: Tensor,
    stats: dict[str, Tensor | float | None],
    weight: Tensor,
) -> None:
    """Append a batch's statistics, in one exchange for all of them.

    A rank where a statistic is nan (no utterance of that kind) does not count for it.
    """
    names = [name for name, value in stats.items() if value is not None]
    values = torch.stack(
        [
            torch.as_tensor(stats[n], device=loss.device).double().reshape(())
            for n in names
        ]
    )
    weight = weight.detach().double()
    bad = (~loss.detach().isfinite()).double()
    result.bad_here.append(bad)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        known = values.isfinite()
        sums = torch.where(known, values * weight, 0.0)
        shared = torch.cat([sums, known * weight, torch.stack([weight, bad])])
        torch.distributed.all_reduce(shared)
        sums, counts, (weight, bad) = shared.tensor_split([len(names), 2 * len(names)])
        values = sums / counts
    result.stats.append(dict(zip(names, values, strict=True)))
    result.weights.append(weight)
    result.bad.append(bad)


def fix_gradient_layout(
    model: DistributedDataParallel,
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager],
) -> None:
    """Have the gradients laid out as they stay, before the first step of a process.

    DistributedDataParallel first lays them out in buckets in the reverse order of the
    parameters, and after its first backward pass again, in the order in which they
    came. Where a gradient lies decides which elements a vectorised sum over it adds up
    first, and with more than two ranks the order in which an element's ranks are added
    up. A resumed training would do its first step with one layout, an uninterrupted one
    with the other, and they would differ in last bits.

    So a second of silence for each domain makes a backward pass that changes nothing:
    in evaluation, in which no random number is drawn and nothing is counted. Gradients
    come in the same order as in training (tested), so that sending them overlaps with
    the backward pass as it did. Leaves the model in evaluation and without gradients.

    Args:
        model: wraps a SpearPretrainModel; all ranks have to call this.
        device: of the model.
        autocast: context of the forward pass.
    """
    student: SpearPretrainModel = model.module
    model.eval()
    count = len(student.domains)
    codes = {
        f"codes_{name}": torch.zeros(
            count, int(teacher.frame_rate), teacher.num_codebooks, dtype=torch.long
        )
        for name, teacher in student.teachers.items()
    }
    batch = {
        "speech": torch.zeros(count, SAMPLE_RATE),
        "speech_lengths": torch.full((count,), SAMPLE_RATE),
        "domain": torch.arange(count)[:, None],
        **codes,
    }
    with torch.enable_grad(), autocast():
        loss = model(**{name: value.to(device) for name, value in batch.items()})[0]
    loss.sum().backward()
    model.zero_grad()

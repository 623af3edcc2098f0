"""Gradients of one optimizer step: the exact mean over batches and ranks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from espnet2.train.reporter import SubReporter
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from espnet2_spear.spear.objective import COUNT
from espnet2_spear.torch_private import foreach_mul_

Autocast = Callable[[], contextlib.AbstractContextManager]


class BatchResult(NamedTuple):
    """Results of a batch: scalars on the device, or, after :func:`to_host`, numbers.

    Attributes:
        stats: of the model, their mean over ranks.
        sums: over ranks: ``weight``, ``bad`` (losses that are not finite), and what is
            counted.
        bad: 1 if the loss of this rank is not finite, else 0.
    """

    stats: dict[str, Any]
    sums: dict[str, Any]
    bad: Any


def accumulate_gradients(
    model: nn.Module,
    batches: Sequence[dict[str, Any]],
    counts: Sequence[Mapping[str, float]],
    autocast: Autocast,
    backward: Callable[[Tensor], None],
    before_batch: Callable[[int], None],
) -> tuple[list[BatchResult], list[dict[str, float]]]:
    """Leave the gradient of sum_i(w_i loss_i) / sum_i(w_i) in the parameters.

    i runs over the batches of all ranks. The losses are divided by the weight of the
    first batches, which is known before the first backward pass, and the gradients
    are corrected by the weight of all when it is known: so they keep the size of a
    mean's gradients (float16 needs that), and nothing waits for the device.

    Args:
        model: returns (loss, stats, weight); wrapped in DistributedDataParallel if
            there is more than one rank. Its gradients are zero or None.
        batches: at least one, on the device; as many on each rank.
        counts: what is to be added up over ranks, for each batch.
        autocast: context of the forward pass.
        backward: ``loss.backward()``, scaled or not.
        before_batch: called with the index of each batch before its forward pass.

    Returns:
        results of the batches, and the seconds that the host waited for each
        (``forward_time``, ``backward_time``).
    """
    results: list[BatchResult] = []
    times = []
    distributed = isinstance(model, DistributedDataParallel)
    ranks = torch.distributed.get_world_size() if distributed else 1
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with contextlib.nullcontext() if last or not distributed else model.no_sync():
            before_batch(index)
            start = time.perf_counter()
            with autocast():
                loss, weight, result = _forward(model, batch, counts[index])
            results.append(result)
            if distributed or len(batches) > 1:
                # DDP's mean over ranks shall be a sum.
                share = weight.detach() * ranks / results[0].sums["weight"]
                loss = loss * share.to(loss.dtype)
            middle = time.perf_counter()
            backward(loss)
            end = time.perf_counter()
            times.append(
                {"forward_time": middle - start, "backward_time": end - middle}
            )
    if len(batches) > 1:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        weights = [result.sums["weight"] for result in results]
        factor = weights[0] / torch.stack(weights).sum()
        foreach_mul_(gradients, factor.to(gradients[0].dtype))
    return results, times


@torch.no_grad()
def evaluate_batch(
    model: nn.Module, batch: dict[str, Any], autocast: Autocast
) -> BatchResult:
    """Result of a batch of the validation."""
    with autocast():
        return to_host(_forward(model, batch, {})[-1])


def register_figures(statistics: SubReporter, result: BatchResult) -> None:
    """Tell ESPnet's reporter what a batch gave, on the host.

    A figure weighs what it was counted over, so that the epoch's is that of all its
    frames; the loss weighs what the batch does.
    """
    for name, value in result.stats.items():
        if not name.endswith(COUNT):
            weight = result.stats.get(name + COUNT, result.sums["weight"])
            statistics.register({name: value}, weight)


def to_host(scalars: Any) -> Any:
    """Bring scalars, in any nested containers, to the host in one transfer."""
    leaves: list[Tensor] = []
    _map(lambda scalar: leaves.append(scalar.double()), scalars)
    values = iter(torch.stack(leaves).tolist())
    return _map(lambda _: next(values), scalars)


def _map(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same dicts, lists and tuples, with function(scalar) for each scalar."""
    if isinstance(tree, Mapping):
        return {name: _map(function, value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        items = [_map(function, value) for value in tree]
        named = hasattr(tree, "_fields")
        return type(tree)(*items) if named else type(tree)(items)
    return function(tree)


def _forward(
    model: nn.Module, batch: dict[str, Any], counts: Mapping[str, float]
) -> tuple[Tensor, Tensor, BatchResult]:
    """Loss and weight of this rank as scalars, and the result over all ranks."""
    loss, stats, weight = model(**batch)
    # ESPnet's models return tensors of one element where DataParallel could gather.
    loss, weight = loss.reshape(()), weight.reshape(())
    return loss, weight, _over_ranks(loss.detach(), stats, weight.detach(), counts)


@torch.no_grad()
def _over_ranks(
    loss: Tensor,
    stats: Mapping[str, Tensor | float | None],
    weight: Tensor,
    counts: Mapping[str, float],
) -> BatchResult:
    """Means and sums of a batch, in one exchange for all of them.

    A rank where a statistic is nan (no utterance of that kind) does not count for it.
    """

    def stack(values: Iterable[Tensor | float]) -> Tensor:
        """The values as float64 (K,) on the device of the loss."""
        tensors = [torch.as_tensor(x, device=loss.device) for x in values]
        return torch.stack([x.double().reshape(()) for x in tensors])

    stats = {name: value for name, value in stats.items() if value is not None}
    bad = (~loss.isfinite()).double()
    sums = {"weight": weight, "bad": bad, **counts}
    means, totals = stack(stats.values()), stack(sums.values())
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        known, weight = means.isfinite(), totals[0]
        shared = [torch.where(known, means * weight, 0.0), known * weight, totals]
        flat = torch.cat(shared)
        torch.distributed.all_reduce(flat)
        weighted, weights, totals = flat.split([len(x) for x in shared])
        means = weighted / weights
    return BatchResult(
        dict(zip(stats, means, strict=True)), dict(zip(sums, totals, strict=True)), bad
    )


def scale_loss_by_weight(model: nn.Module) -> None:
    """Let the model return its loss times the batch's weight.

    DeepSpeed's trainer expects a summed loss, ours is a mean: that trainer divides by
    the sum of all ranks' weights without multiplying by the own one first. With this
    the gradients are the exact mean over ranks, as with ESPnet's usual trainer.
    """

    def times_weight(
        module: nn.Module, inputs: Any, output: tuple[Tensor, dict, Tensor]
    ) -> tuple[Tensor, dict, Tensor]:
        loss, stats, weight = output
        stats = {k: v for k, v in stats.items() if not k.endswith(COUNT)}
        return loss * weight.detach().to(loss.dtype), stats, weight

    model.register_forward_hook(times_weight)

"""A training step without a GPU and without values: its memory and operations.

Fake tensors have shapes and types, and no memory. They say that they lie on a CPU,
whose backward pass asks no driver, and go the ways of a GPU: plain functions of the
network, chunks of a GPU's size.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, shape_wrapper

from espnet2_spear.errors import UserError
from espnet2_spear.spear import objective
from espnet2_spear.torch_private import TorchDispatchMode, fake_tensors
from espnet2_spear.zipformer import conv_embed
from espnet2_spear.zipformer.cpu import use_cpu_versions


class StepCosts(NamedTuple):
    """Costs of a step; memory in bytes.

    Attributes:
        weights: parameters and buffers.
        gradients: of all parameters, as while batches are accumulated.
        optimizer: its states.
        activations: what the student keeps for the backward pass, with the batch.
        heads: what the heads keep for it.
        passing: what else is there at the peak.
        operations: of matrix products and convolutions, forward and backward.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    heads: int
    passing: int
    operations: float

    @property
    def lasting(self) -> int:
        """Bytes that do not depend on the batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """All bytes at the peak."""
        return self.lasting + self.activations + self.heads + self.passing


class AllocatedBytes(TorchDispatchMode):
    """Counts the memory of tensors that operations make, until they are freed.

    And the operations of products: torch's FlopCounterMode, which has the formulas,
    holds tensors that would be freed.

    Args:
        others: tensors that are there before, and stay.

    Attributes:
        now: bytes.
        peak: the most so far.
        operations: of matrix products and convolutions.
    """

    def __init__(self, others: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.operations = 0
        self._alive = {id(x.untyped_storage()): 0 for x in others}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := FORMULAS.get(func):
            self.operations += formula(*args, **(kwargs or {}), out_val=out)
        for x in _tensors(out):
            self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)  # torch keeps the object as long as the memory
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let tensors on a CPU go the ways of a GPU, so that they take as much memory."""
    with ExitStack() as stack:
        stack.callback(use_cpu_versions)
        use_cpu_versions(False)
        # Chunks of a CPU are small for its caches, and would hide a GPU's peak.
        for table in (objective.CHUNK_LOGITS, conv_embed.BLOCK_FRAMES):
            stack.enter_context(mock.patch.dict(table, cpu=table["other"]))
        stack.enter_context(mock.patch.object(objective, "HOST", ()))
        yield


def simulate_step(
    build: Callable[[], tuple[nn.Module, Sequence[torch.optim.Optimizer]]],
    make_batch: Callable[[], Mapping[str, Tensor]],
    amp_dtype: torch.dtype | None,
) -> StepCosts:
    """Do a training step of fake tensors, and count.

    What regularisers keep is drawn by ``random``: seed it.

    Args:
        build: makes a SpearPretrainModel, in training, and its optimizers.
        make_batch: makes the arguments of its ``forward``.
        amp_dtype: of autocast; None: off.

    Raises:
        UserError: this version of torch does not tell of its operations.
    """
    if TorchDispatchMode is object:
        raise UserError(
            f"torch {torch.__version__} does not tell of its operations, which the "
            "plan counts: install another version, such as 2.11"
        )
    with as_on_a_gpu(), fake_tensors():
        model, optimizers = build()
        first_update(model, optimizers)
        weights = [*model.parameters(), *model.buffers()]
        states = _tensors([list(o.state.values()) for o in optimizers])
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        memory = AllocatedBytes([*weights, *gradients, *states])
        heads = _kept_by(model.heads, memory)
        with memory:
            batch = make_batch()
            with torch.autocast("cpu", amp_dtype, enabled=amp_dtype is not None):
                loss = model(**batch)[0]
            kept = memory.now
            loss.sum().backward()
    return StepCosts(
        weights=_size(weights),
        gradients=_size(gradients),
        optimizer=_size(states),
        activations=kept - sum(heads),
        heads=sum(heads),
        passing=memory.peak - kept,
        operations=float(memory.operations),
    )


def first_update(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Make all that lasts: gradients, of zeros, and the optimizers' states."""
    # The first step alone allocates them; the peak is that of all later ones.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()


def _kept_by(modules: nn.ModuleDict, memory: AllocatedBytes) -> list[int]:
    """A list that gets the bytes that each module leaves behind."""
    before, kept = [], []
    for module in modules.values():
        module.register_forward_pre_hook(lambda *_: before.append(memory.now))
        module.register_forward_hook(lambda *_: kept.append(memory.now - before[-1]))
    return kept


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        return [x for part in tree for x in _tensors(part)]
    return [tree] if isinstance(tree, Tensor) else []


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; views of one storage count once."""
    storages = [x.untyped_storage() for x in tensors]
    return sum({id(s): s.nbytes() for s in storages}.values())


def convolution_backward(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *others, **unused
) -> int:
    """Operations for the gradients of x and weight, from the shapes.

    torch's own formula forgets that the convolution may be depthwise.
    """
    gradients = sum(others[7][:2])  # output_mask
    return 2 * gradients * grad[0] * math.prod(grad[2:]) * math.prod(weight)


_FORMULAS = {
    **flop_registry,
    torch.ops.aten.convolution_backward: shape_wrapper(convolution_backward),
}
FORMULAS = {
    getattr(operation, overload): formula
    for operation, formula in _FORMULAS.items()
    for overload in operation.overloads()
}

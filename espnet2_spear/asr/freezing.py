"""A student that is fixed for the first updates and trained afterwards."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

# Training steps without an update after which something must be wrong.
_PATIENCE = 1000


class FreezeSchedule(nn.Module):
    """Keeps parameters as they are for the first optimizer updates.

    The parameters need gradients from the start, so that the optimizer and DDP know
    them. While they are frozen their gradients are taken away right before each
    update: an optimizer then leaves a parameter alone altogether, without weight decay
    and momentum, and its state begins when the parameter is released. Updates are
    counted where they happen, whatever the gradient accumulation; those that mixed
    precision skips do not count.

    The count is in the state dict, as one float32 number: it goes on when training is
    resumed, and averaging checkpoints averages it, where ESPnet would add integers up.
    A state dict without it loads and leaves the count as it is.

    Args:
        module: whose parameters are frozen; not registered as a sub-module.
        steps: updates (not batches, if gradients are accumulated).
    """

    def __init__(self, module: nn.Module, steps: int) -> None:
        super().__init__()
        self._module = (module,)
        self.steps = steps
        self.updates = 0.0
        self._waited = 0

    @property
    def frozen(self) -> bool:
        """Whether the parameters are still fixed."""
        return self.updates < self.steps

    def parameters_frozen(self) -> list[nn.Parameter]:
        """Parameters that will be trained when the time has come."""
        return [p for p in self._module[0].parameters() if p.requires_grad]

    def attach(self, features: Tensor) -> Tensor:
        """Make the frozen parameters part of the graph, with no gradient.

        Call it in every training step while ``frozen``: DDP waits for every parameter.

        Args:
            features: any tensor that the loss will depend on.
        """
        _watch(self)
        self._waited += 1
        if self._waited == _PATIENCE:
            logging.warning(
                f"frontend spear: freeze_steps {self.steps} still waits for the first "
                f"update after {_PATIENCE} batches: no optimizer of torch holds the "
                "student (DeepSpeed and sharded training are not supported)"
            )
        return _Attach.apply(features, *self.parameters_frozen())

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Count an update of these parameters, and prevent it while they are frozen."""
        own = self.parameters_frozen()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held.isdisjoint(map(id, own)):
            return
        if self.frozen:
            for p in own:
                p.grad = None
        self._waited = 0
        self.updates += 1.0
        if not self.frozen:
            logging.info(f"frontend spear: unfrozen after {self.steps} updates")

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[prefix + "updates"] = torch.tensor(
            self.updates, dtype=torch.float32
        )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *unused: Any
    ) -> None:
        value = state_dict.get(prefix + "updates")
        if value is not None:
            self.updates = float(value)


class _Attach(torch.autograd.Function):
    """Identity of the first argument; the others get an undefined gradient."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *[None] * ctx.count


# Schedules whose parameters are frozen in a training that goes on.
_WATCHED: WeakSet[FreezeSchedule] = WeakSet()
_HANDLES: list[Any] = []


def _watch(schedule: FreezeSchedule) -> None:
    _WATCHED.add(schedule)
    if not _HANDLES:
        _HANDLES.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer: torch.optim.Optimizer, *unused: Any) -> None:
    for schedule in list(_WATCHED):
        schedule.before_update(optimizer)
        if not schedule.frozen:
            _WATCHED.discard(schedule)

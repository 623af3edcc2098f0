"""Eden: the learning-rate schedule that goes with ScaledAdam."""

from __future__ import annotations

import torch
from espnet2.schedulers.abs_scheduler import AbsBatchStepScheduler
from torch.optim.lr_scheduler import LRScheduler


def eden_factor(
    batch: float,
    amount: float,
    lr_batches: float,
    lr_amount: float,
    warmup_batches: float,
    warmup_start: float,
) -> float:
    """Factor on the base learning rate (Zipformer, eq. 8).

    ((b^2 + B^2) / B^2)^-1/4 ((a^2 + A^2) / A^2)^-1/4 w(b), where w rises linearly
    from ``warmup_start`` to 1 over ``warmup_batches``.

    Args:
        batch: optimizer steps b done.
        amount: position a on the second axis: audio hours (SPEAR) or epochs.
        lr_batches: B, steps after which the first factor bends.
        lr_amount: A, in the unit of ``amount``.
        warmup_batches: length of the warm-up.
        warmup_start: factor at step 0.
    """
    decay = (1 + (batch / lr_batches) ** 2) ** -0.25
    decay *= (1 + (amount / lr_amount) ** 2) ** -0.25
    if batch >= warmup_batches:
        return decay
    return decay * (warmup_start + (1 - warmup_start) * batch / warmup_batches)


class Eden(LRScheduler, AbsBatchStepScheduler):
    """Schedule by optimizer steps and by the audio seen.

    ESPnet's schedulers count steps only. So the second axis advances by a constant
    amount per step, ``hours_per_batch``: seconds of audio per optimizer step over all
    ranks and accumulated batches, divided by 3600; or 1 / (steps per epoch) for a
    schedule by epochs. With null it advances by what :meth:`count_audio` is told,
    which a trainer that counts the audio calls before each step: real hours, however
    full batches are.

    Args:
        optimizer: whose learning rates are scheduled.
        lr_batches: steps after which the first factor bends.
        lr_hours: hours (or epochs) after which the second factor bends.
        hours_per_batch: hours (or epochs) per optimizer step; 0 leaves that factor 1;
            None: counted ones.
        warmup_batches: length of the warm-up in steps.
        warmup_start: factor at step 0.
        last_epoch: index of the last step, for torch's resuming.

    Attributes:
        hours: position on the second axis.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        lr_batches: float = 7500.0,
        lr_hours: float = 25000.0,
        hours_per_batch: float | None = 0.0,
        warmup_batches: float = 500.0,
        warmup_start: float = 0.5,
        last_epoch: int = -1,
    ) -> None:
        if lr_batches <= 0 or lr_hours <= 0 or (hours_per_batch or 0.0) < 0:
            raise ValueError(
                f"lr_batches {lr_batches} and lr_hours {lr_hours} must be positive, "
                f"hours_per_batch {hours_per_batch} not negative"
            )
        self.lr_batches = lr_batches
        self.lr_hours = lr_hours
        self.hours_per_batch = hours_per_batch
        self.warmup_batches = warmup_batches
        self.warmup_start = warmup_start
        self.hours = 0.0
        super().__init__(optimizer, last_epoch)

    def count_audio(self, seconds: float) -> None:
        """Add the seconds of audio of the coming step, over all ranks.

        It is the same number on every rank, or their learning rates would part. Does
        nothing where ``hours_per_batch`` is a number.
        """
        if self.hours_per_batch is None:
            self.hours += seconds / 3600

    def get_lr(self) -> list[float]:
        """Learning rate of every parameter group at the current step."""
        if self.hours_per_batch is not None:
            # A product and no sum, so that rounding does not add up.
            self.hours = self.last_epoch * self.hours_per_batch
        elif self.last_epoch > 0 and not self.hours:
            raise RuntimeError(
                "eden: hours_per_batch is null, but nobody counts the audio: give a "
                "number of hours for a step of this task"
            )
        factor = eden_factor(
            self.last_epoch,
            self.hours,
            self.lr_batches,
            self.lr_hours,
            self.warmup_batches,
            self.warmup_start,
        )
        return [base * factor for base in self.base_lrs]

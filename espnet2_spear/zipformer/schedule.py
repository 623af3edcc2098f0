"""Schedules of the training behaviour, and the count of batches they depend on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

SCHEDULES_END = 50000.0  # batches after which no schedule changes any more
# A constant, or (batch count, value) points in rising order.
Scheduled = float | tuple[tuple[float, float], ...]


class BatchCount:
    """Training batches so far, in units of a fixed amount of audio.

    What shapes training depends on the audio seen, not on how it was cut into
    batches: a batch counts as its seconds (padding included, over all ranks) divided
    by ``seconds_per_batch``. Gradient accumulation needs no correction.

    Args:
        seconds_per_batch: audio that counts as one batch; 600 in the reference.
        start: count before the first batch, for fine-tuning.

    Attributes:
        value: the count, a plain number; ranks differ as much as their batches do.
        loss_scale: factor on the loss of a frame before the backward pass: 1 / frames
            for a mean, times the scale of float16 training. Gradients that are added
            to those of the loss follow it.
    """

    def __init__(self, seconds_per_batch: float = 600.0, start: float = 0.0) -> None:
        self.seconds_per_batch = seconds_per_batch
        self.value = start
        self.loss_scale = 1.0

    def advance(self, seconds: float) -> None:
        """Count a batch of this rank."""
        ranks = 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = torch.distributed.get_world_size()
        self.value += seconds * ranks / self.seconds_per_batch

    def at(self, scheduled: Scheduled) -> float:
        """Value at the present count of a constant or piecewise linear schedule."""
        if not isinstance(scheduled, tuple):
            return scheduled
        after = bisect_right(scheduled, self.value, key=lambda point: point[0])
        if after == 0:
            return scheduled[0][1]
        if after == len(scheduled):
            return scheduled[-1][1]
        (x0, y0), (x1, y1) = scheduled[after - 1 : after + 1]
        return y0 + (y1 - y0) * (self.value - x0) / (x1 - x0)


class BatchCountState(nn.Module):
    """Carries a batch count in the state dict of the model that is trained.

    The state is one float32 number: averaging checkpoints averages it, where ESPnet
    would add up an integer. A state dict without it (of a model that was trained
    without regularisers) loads and leaves the count as it is. The owner is the
    outermost model, so that the student's own tensors are those of the released
    checkpoints.

    Args:
        count: the count that the student's modules share; None: a student without
            regularisers, which takes state dicts of one that has them.
    """

    def __init__(self, count: BatchCount | None) -> None:
        super().__init__()
        self.count = count

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if self.count is None:
            return
        destination[prefix + "batches"] = torch.tensor(
            self.count.value, dtype=torch.float32
        )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *unused: Any
    ) -> None:
        value = state_dict.get(prefix + "batches")
        if value is not None and self.count is not None:
            self.count.value = float(value)

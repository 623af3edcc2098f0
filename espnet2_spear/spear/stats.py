"""Sums and counts behind the statistics of a step."""

from __future__ import annotations

import torch
from torch import Tensor


class StatSums:
    """Collects numerators and denominators, averaged over all ranks at once.

    ESPnet averages statistics over ranks with the batch's weight and needs the
    same keys everywhere; a rank without an utterance of a domain would spoil or
    bias that domain's figures. Sums over ranks are exact.

    Args:
        device: where to collect.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, name: str, total: Tensor, count: Tensor) -> None:
        """Remember total / count, two scalars, under a name."""
        self._sums[name] = (total.detach().float(), count.detach().float())

    def averages(self) -> dict[str, Tensor]:
        """Return name -> average; nan (which the reporter skips) without a count."""
        if not self._sums:
            return {}
        sums = torch.stack([torch.stack(pair) for pair in self._sums.values()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        return dict(zip(self._sums, sums[:, 0] / sums[:, 1], strict=True))

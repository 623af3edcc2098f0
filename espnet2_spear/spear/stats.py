"""Sums and counts behind the statistics of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from espnet2_spear.spear.codebook_loss import CodebookLoss


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

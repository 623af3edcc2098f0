"""Where gradients lie in memory, the same for every step of a training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch.nn.parallel import DistributedDataParallel

from espnet2_spear.spear.model import SpearPretrainModel

SAMPLES = 16000


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
        "speech": torch.zeros(count, SAMPLES),
        "speech_lengths": torch.full((count,), SAMPLES),
        "domain": torch.arange(count)[:, None],
        **codes,
    }
    with torch.enable_grad(), autocast():
        loss = model(**{name: value.to(device) for name, value in batch.items()})[0]
    loss.sum().backward()
    model.zero_grad()

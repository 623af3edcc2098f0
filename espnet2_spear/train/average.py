"""Average of the model over the steps of a training, and over any part of it.

After n samples theta_1..theta_n of the parameters their mean is

    m_n = m_(n-1) + (theta_n - m_(n-1)) / n,

and the mean over the samples between two epochs, after n_a and n_b of them, is

    (n_b m_b - n_a m_a) / (n_b - n_a)

(as icefall, whose scripts trained SPEAR, averages its checkpoints). Which epochs to
average is so decided after the training, which neither the best epochs' mean of ESPnet
nor torch's AveragedModel can do; nor do they keep the float64 that a difference of two
long means needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espnet2_spear.errors import UserError
from espnet2_spear.fileio.atomic import save_whole

FOLDER = "running_average"


class RunningAverage:
    """Mean of the parameters over samples of the training so far, float64, on the CPU.

    Args:
        period: optimizer steps between two samples; 0 switches averaging off.

    Attributes:
        count: samples so far.
    """

    def __init__(self, period: int) -> None:
        self.period = period
        self.count = 0
        self._mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def after_step(self, model: nn.Module, steps: int) -> None:
        """Take a sample if ``steps`` optimizer steps say that it is time."""
        if self.period <= 0 or steps % self.period:
            return
        self.count += 1
        for name, value in model.named_parameters():
            value = value.detach().to("cpu", torch.float64)
            if name not in self._mean:
                self._mean[name] = value.clone()
            else:
                mean = self._mean[name]
                mean.add_((value - mean) / self.count)

    def state_dict(self) -> dict[str, Any]:
        """Count and float64 means."""
        return {"count": self.count, "mean": dict(self._mean)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from another run's state."""
        self.count = state["count"]
        self._mean = {k: v.clone() for k, v in state["mean"].items()}


def save_epoch_average(
    average: RunningAverage, model: nn.Module, folder: Path, epoch: int, keep: int
) -> None:
    """Write ``running_average/{epoch}epoch.pth``; keep the newest ``keep`` of them.

    They are float32, half of the disk: a mean of the last hundredth of a training then
    has a relative error of 1e-5. Nothing is written before the first sample.
    """
    if average.count == 0 or keep <= 0:
        return
    state = average.state_dict()
    state["mean"] = {k: v.float() for k, v in state["mean"].items()}
    # The rest of the model's state, so that an average is a complete model.
    state["other"] = {
        k: v for k, v in model.state_dict().items() if k not in state["mean"]
    }
    save_whole(state, average_file(folder, epoch))
    for old in (folder / FOLDER).glob("*epoch.pth"):
        number = old.name.removesuffix("epoch.pth")
        if number.isdecimal() and int(number) <= epoch - keep:
            old.unlink()


def average_file(folder: Path, epoch: int) -> Path:
    """Path of the running average at the end of an epoch."""
    return folder / FOLDER / f"{epoch}epoch.pth"


def average_between(folder: Path, first: int, last: int) -> dict[str, Tensor]:
    """Mean of the model from the end of one epoch to the end of another.

    Args:
        folder: an experiment.
        first: epoch after which the average begins; 0 for the start of training.
        last: epoch with whose end it ends.

    Returns:
        a complete state dict, its mean in float32.

    Raises:
        UserError: an average that was not kept, or no sample in between.
    """
    if not 0 <= first < last:
        raise UserError(
            f"epochs {first} to {last}: the first must be 0 or more and before the last"
        )
    end = _read(folder, last)
    start = {"count": 0, "mean": dict.fromkeys(end["mean"], 0.0)}
    if first > 0:
        start = _read(folder, first)
    count = end["count"] - start["count"]
    if count <= 0:
        raise UserError(
            f"{folder}: no sample of the model was taken from epoch {first} to {last}; "
            "choose epochs further apart, or train with a smaller --average_period"
        )
    mean = {
        k: (end["count"] * v - start["count"] * start["mean"][k]) / count
        for k, v in end["mean"].items()
    }
    return {**{k: v.float() for k, v in mean.items()}, **end["other"]}


def _read(folder: Path, epoch: int) -> dict[str, Any]:
    path = average_file(folder, epoch)
    if not path.exists():
        there = sorted(
            int(p.name.removesuffix("epoch.pth"))
            for p in (folder / FOLDER).glob("[0-9]*epoch.pth")
        )
        raise UserError(
            f"{path}: not there. Epochs with a running average: {there or 'none'} "
            "(--keep_averages says how many are kept, --average_period 0 makes none)"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path}: cannot be read ({error}); choose another epoch"
        ) from error
    return {**content, "mean": {k: v.double() for k, v in content["mean"].items()}}


def disk_bytes(parameters: int, options: Mapping[str, Any]) -> int:
    """Bytes that a training keeps while it runs.

    Two checkpoints (weights, two tensors of the optimizer, a float64 average), and in
    float32 the averages of epochs, the best models, the last one and their mean.

    Args:
        parameters: of the model.
        options: of the trainer; absent ones are at their defaults.
    """
    averages = options.get("average_period", 200) > 0
    best = options.get("keep_nbest_models", 10)
    models = best if isinstance(best, int) else max(best)
    models += options.get("keep_averages", 10) * averages + 2
    return parameters * (2 * (4 + 8 + 8 * averages) + 4 * models)

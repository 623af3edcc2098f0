"""ESPnet's reporter, able to go on in the middle of an epoch."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from espnet2.train.reporter import Average, Reporter, SubReporter, WeightedAverage

from espnet2_spear.fileio.optional_output import warn_on_oserror


class SpearReporter(Reporter):
    """Statistics of all epochs; also those of an epoch that was interrupted.

    Its state holds Python's own types only, whichever ESPnet writes it, and it reads
    the states of both supported versions. Pictures and curves that cannot be written,
    as on a full disk, are left out.
    """

    def __init__(self, epoch: int = 0) -> None:
        super().__init__(epoch)
        self.interrupted: dict[str, Any] | None = None

    def state_before(self, epoch: int) -> dict[str, Any]:
        """Statistics of the epochs before this one."""
        stats = {e: s for e, s in self.stats.items() if e < epoch}
        return primitive({"stats": stats, "epoch": epoch - 1})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore from :meth:`state_before`, or from the state of ESPnet's reporter."""
        self.epoch = state_dict["epoch"]
        self.stats = from_primitive(state_dict["stats"])

    def start_epoch(self, key: str, epoch: int | None = None) -> SubReporter:
        """Begin, or go on with what :attr:`interrupted` holds of this epoch."""
        sub_reporter = super().start_epoch(key, epoch)
        state = self.interrupted
        if state is not None and (key, self.epoch) == (state["key"], state["epoch"]):
            restore_statistics(sub_reporter, state)
            self.interrupted = None
        return sub_reporter

    def matplotlib_plot(self, output_dir: str | Path) -> None:
        """Draw the statistics, if there is room."""
        with warn_on_oserror(output_dir):
            super().matplotlib_plot(output_dir)

    def tensorboard_add_scalar(self, *args: Any, **kwargs: Any) -> None:
        """Pass the statistics to TensorBoard, if there is room."""
        with warn_on_oserror("TensorBoard's curves"):
            super().tensorboard_add_scalar(*args, **kwargs)


def statistics_state(reporter: SubReporter) -> dict[str, Any]:
    """Everything that an epoch's reporter has collected, as tensors and numbers."""
    stats = {}
    for name, values in reporter.stats.items():
        weights = None
        if isinstance(values[0], WeightedAverage):
            weights = torch.tensor([v.weight for v in values], dtype=torch.float64)
        stats[name] = {
            "values": torch.tensor([v.value for v in values], dtype=torch.float64),
            "weights": weights,
        }
    return {
        "key": reporter.key,
        "epoch": reporter.epoch,
        "count": reporter.count,
        "total_count": reporter.total_count,
        "seconds": time.perf_counter() - reporter.start_time,
        "stats": stats,
    }


def restore_statistics(reporter: SubReporter, state: dict[str, Any]) -> None:
    """Put :func:`statistics_state` back into a new reporter of the same epoch."""
    reporter.count = state["count"]
    reporter.total_count = state["total_count"]
    reporter.start_time -= state["seconds"]
    for name, stat in state["stats"].items():
        values = stat["values"].tolist()
        if stat["weights"] is None:
            reporter.stats[name] = [Average(v) for v in values]
        else:
            weights = stat["weights"].tolist()
            reporter.stats[name] = [
                WeightedAverage(v, w) for v, w in zip(values, weights, strict=True)
            ]


def recent(reporter: SubReporter, name: str, count: int) -> float:
    """Mean of the last ``count`` values of a statistic, not counting nan.

    Weighted as the reporter weights; nan if there is none.
    """
    values = reporter.stats.get(name, [])[-count:]
    pairs = [(v.value, getattr(v, "weight", 1.0)) for v in values]
    pairs = [(v, w) for v, w in pairs if np.isfinite(v) and np.isfinite(w)]
    total = sum(w for _, w in pairs)
    return sum(v * w for v, w in pairs) / total if total > 0 else float("nan")


def primitive(value: Any) -> Any:
    """Replace NumPy scalars and time spans by what ``weights_only`` loading accepts.

    As ESPnet 202611 does it; 202511 writes them as they are.
    """
    if isinstance(value, Mapping):
        return {k: primitive(v) for k, v in value.items()}
    if isinstance(value, datetime.timedelta):
        return {"__timedelta_seconds__": value.total_seconds()}
    if isinstance(value, np.generic):
        return value.item()
    return value


def from_primitive(value: Any) -> Any:
    """Undo :func:`primitive`; NumPy scalars stay Python's."""
    if isinstance(value, Mapping):
        if set(value) == {"__timedelta_seconds__"}:
            return datetime.timedelta(seconds=value["__timedelta_seconds__"])
        return {k: from_primitive(v) for k, v in value.items()}
    return value

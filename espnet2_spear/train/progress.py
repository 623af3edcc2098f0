"""One line from time to time that says how a training is doing."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from espnet2.train.reporter import SubReporter
from humanfriendly import format_timespan

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.side_output import side_output
from espnet2_spear.train.reporter import recent
from espnet2_spear.train.run_state import RunState
from espnet2_spear.train.step import StepFigures
from espnet2_spear.train.trainer_options import SpearTrainerOptions

PERCENTILES = (50, 90, 99)


class Progress:
    """Counts what went by since this process began, and since the last line.

    Args:
        max_epoch: epochs of the training.
        epoch_batches: of an epoch; None if the iterator does not say.

    Attributes:
        batches: since the last line.
    """

    def __init__(self, max_epoch: int, epoch_batches: int | None) -> None:
        self.max_epoch = max_epoch
        self.epoch_batches = epoch_batches
        self._grad_norms: list[float] = []
        self._utts = self._samples = self._skipped = 0.0
        self._since = time.perf_counter()
        # Seconds and batches of the last lines: speeds change during a training.
        self._speeds: deque[tuple[float, int]] = deque(maxlen=10)
        self.batches = 0

    def count(self, figures: StepFigures) -> None:
        """Count a step; figures of all ranks."""
        self.batches += figures.batches
        self._utts += figures.utts
        self._samples += figures.samples
        self._skipped = figures.skipped_utts
        if math.isfinite(figures.grad_norm):
            self._grad_norms.append(figures.grad_norm)

    def grad_norm_percentiles(self) -> dict[str, float]:
        """Of the steps since the last line; nothing if none was valid."""
        if not self._grad_norms:
            return {}
        values = np.percentile(self._grad_norms, PERCENTILES)
        return {
            f"grad_norm_p{p}": float(v)
            for p, v in zip(PERCENTILES, values, strict=True)
        }

    def line(
        self,
        reporter: SubReporter,
        pairs: Sequence[str],
        position: int,
        samples: float,
        lr: float,
    ) -> str:
        """Say it, and begin to count anew.

        Args:
            reporter: of the epoch.
            pairs: prefixes ``<domain>_<teacher>`` of its statistics.
            position: batches of the epoch so far.
            samples: of the whole training so far.
            lr: learning rate now.
        """
        now = time.perf_counter()
        seconds, last = max(now - self._since, 1e-9), self.batches
        self._speeds.append((seconds, last))

        def mean(name: str) -> float:
            return recent(reporter, name, last)

        of = f"/{self.epoch_batches}" if self.epoch_batches else ""
        parts = [
            f"epoch {reporter.get_epoch()}/{self.max_epoch} batch {position}{of}",
            f"{samples / SAMPLE_RATE / 3600:.3g} h of audio",
            f"{self._utts / seconds:.3g} utterances/s, "
            f"{self._samples / SAMPLE_RATE / seconds:.0f} s of audio per s",
            f"masked {100 * mean('mask_ratio'):.0f} %, "
            f"padding {100 * mean('padding_waste'):.0f} %",
            f"loss {mean('loss'):.4g}",
        ]
        if self._skipped:
            parts.insert(2, f"skipped utterances: {self._skipped:.0f}")
        for pair in pairs:
            loss = mean(f"{pair}_loss")
            if math.isfinite(loss):
                masked = 100 * mean(f"{pair}_acc_masked")
                unmasked = 100 * mean(f"{pair}_acc_unmasked")
                parts.append(
                    f"{pair.replace('_', ':')} {loss:.4g} acc {masked:.1f} % masked "
                    f"{unmasked:.1f} % not"
                )
        if self._grad_norms:
            parts.append(f"grad norm {np.median(self._grad_norms):.3g}")
        parts.append(f"lr {lr:.3g}")
        if self.epoch_batches:
            epochs = self.max_epoch - reporter.get_epoch() + 1
            left = epochs * self.epoch_batches - position
            spent, done = (sum(x) for x in zip(*self._speeds, strict=True))
            parts.append(
                f"ends in {format_timespan(left * spent / max(done, 1), max_units=2)}"
            )
        self._since, self.batches = now, 0
        self._utts = self._samples = 0.0
        self._grad_norms = []
        return " | ".join(parts)


def report_progress(
    progress: Progress,
    state: RunState,
    optimizers: Sequence[torch.optim.Optimizer],
    reporter: SubReporter,
    options: SpearTrainerOptions,
) -> None:
    """Line of progress and curves; rank 0 has the figures of all."""
    if state.rank != 0:
        return
    percentiles = progress.grad_norm_percentiles()
    count = progress.batches
    pairs = [f"{d}_{t}" for d in state.model.domains for t in state.model.teachers]
    lr = optimizers[0].param_groups[0]["lr"]
    logging.info(progress.line(reporter, pairs, state.position, state.samples, lr))
    hours = state.samples / SAMPLE_RATE / 3600
    if state.summary_writer is not None:
        with side_output("TensorBoard's curves"):
            reporter.tensorboard_add_scalar(state.summary_writer, -count)
            for name, value in {**percentiles, "hours_of_audio": hours}.items():
                state.summary_writer.add_scalar(name, value, reporter.total_count)
    if options.use_wandb:
        import wandb

        reporter.wandb_log(-count)
        extra = {f"train/{k}": v for k, v in percentiles.items()}
        wandb.log({**extra, "train/hours_of_audio": hours})

"""How a training is doing: a line from time to time, and the curves of its figures."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from espnet2.train.reporter import SubReporter
from humanfriendly import format_timespan

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.optional_output import warn_on_oserror
from espnet2_spear.train.checkpoint import RunState
from espnet2_spear.train.options import SpearTrainerOptions
from espnet2_spear.train.reporter import SpearReporter, recent
from espnet2_spear.train.step import StepFigures

PERCENTILES = (50, 90, 99)


class Progress:
    """Counts what went by since the last line.

    Args:
        max_epoch: epochs of the training.
        epoch_batches: of an epoch; None if the iterator does not say.

    Attributes:
        batches: since the last line.
    """

    def __init__(self, max_epoch: int, epoch_batches: int | None) -> None:
        self.max_epoch = max_epoch
        self.epoch_batches = epoch_batches
        # Seconds and batches of the last lines: speeds change during a training.
        self._speeds: deque[tuple[float, int]] = deque(maxlen=10)
        self._skipped_utts = 0.0
        self.begin_line()

    def begin_line(self) -> None:
        """Count anew."""
        self.batches = 0
        self._grad_norms: list[float] = []
        self._utts = self._samples = 0.0
        self._since = time.perf_counter()

    def count(self, figures: StepFigures) -> None:
        """Count a step; figures of all ranks."""
        self.batches += figures.batches
        self._utts += figures.utts
        self._samples += figures.samples
        self._skipped_utts = figures.skipped_utts
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
        self, statistics: SubReporter, pairs: Sequence[str], state: RunState
    ) -> str:
        """Say it.

        Args:
            statistics: of the epoch.
            pairs: prefixes ``<domain>_<teacher>`` of its names.
            state: of the run.
        """
        seconds = max(time.perf_counter() - self._since, 1e-9)
        self._speeds.append((seconds, self.batches))

        def mean(name: str) -> float:
            return recent(statistics, name, self.batches)

        of = f"/{self.epoch_batches}" if self.epoch_batches else ""
        parts = [
            f"epoch {state.epoch}/{self.max_epoch} batch {state.position}{of}",
            f"{state.samples / SAMPLE_RATE / 3600:.3g} h of audio",
            f"{self._utts / seconds:.3g} utterances/s, "
            f"{self._samples / SAMPLE_RATE / seconds:.0f} s of audio per s",
            f"masked {100 * mean('mask_ratio'):.0f} %, "
            f"padding {100 * mean('padding_waste'):.0f} %",
            f"loss {mean('loss'):.4g}",
        ]
        if self._skipped_utts:
            parts.insert(2, f"skipped utterances: {self._skipped_utts:.0f}")
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
        parts.append(f"lr {state.optimizers[0].param_groups[0]['lr']:.3g}")
        if self.epoch_batches:
            epochs = self.max_epoch - state.epoch + 1
            left = epochs * self.epoch_batches - state.position
            spent, done = (sum(x) for x in zip(*self._speeds, strict=True))
            ends = format_timespan(left * spent / max(done, 1), max_units=2)
            parts.append(f"ends in {ends}")
        return " | ".join(parts)


class Curves:
    """Where people look at a training: log, pictures, TensorBoard and wandb.

    Args:
        options: of the trainer.
        is_first: whether this is rank 0, which shows the figures of all.

    Attributes:
        train_writer: TensorBoard's, or None.
    """

    def __init__(self, options: SpearTrainerOptions, is_first: bool) -> None:
        self.options = options
        self.folder = Path(options.output_dir)
        self.train_writer = self.valid_writer = None
        if options.use_tensorboard and is_first:
            from torch.utils.tensorboard import SummaryWriter

            self.train_writer, self.valid_writer = (
                SummaryWriter(str(self.folder / "tensorboard" / phase))
                for phase in ("train", "valid")
            )

    def show(
        self, progress: Progress, state: RunState, statistics: SubReporter
    ) -> None:
        """Log a line and add a point to the curves; then count anew."""
        pairs = [f"{d}_{t}" for d in state.model.domains for t in state.model.teachers]
        logging.info(progress.line(statistics, pairs, state))
        extra = progress.grad_norm_percentiles()
        extra["hours_of_audio"] = state.samples / SAMPLE_RATE / 3600
        count = progress.batches
        progress.begin_line()
        if self.train_writer is not None:
            with warn_on_oserror("TensorBoard's curves"):
                statistics.tensorboard_add_scalar(self.train_writer, -count)
                for name, value in extra.items():
                    self.train_writer.add_scalar(name, value, statistics.total_count)
        if self.options.use_wandb:
            statistics.wandb_log(-count)
            _wandb().log({f"train/{k}": v for k, v in extra.items()})

    def show_epoch(self, reporter: SpearReporter) -> None:
        """Log and draw the means of an epoch."""
        logging.info(reporter.log_message())
        if self.options.use_matplotlib:
            reporter.matplotlib_plot(self.folder / "images")
        if self.train_writer is not None:
            reporter.tensorboard_add_scalar(self.train_writer, key1="train")
            reporter.tensorboard_add_scalar(self.valid_writer, key1="valid")
        if self.options.use_wandb:
            reporter.wandb_log()

    def log_model(self, file: Path, epoch: int, best: Sequence[str]) -> None:
        """Give wandb the model of every ``wandb_model_log_interval``-th epoch.

        Args:
            file: the model.
            epoch: after which it was written.
            best: criteria of which this epoch is the best.
        """
        if best:
            logging.info(f"The best model has been updated: {', '.join(best)}")
        interval = self.options.wandb_model_log_interval
        if self.options.use_wandb and interval > 0 and epoch % interval == 0:
            wandb = _wandb()
            artifact = wandb.Artifact(
                name=f"model_{wandb.run.id}",
                type="model",
                metadata={"improved": list(best)},
            )
            artifact.add_file(str(file))
            aliases = [f"epoch-{epoch}", *(["best"] if best else [])]
            wandb.log_artifact(artifact, aliases=aliases)


def _wandb() -> Any:
    import wandb

    return wandb

"""Progress of a training: lines of the log, curves, and predictions."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from espnet2.train.reporter import Reporter, SubReporter, aggregate
from humanfriendly import format_timespan
from torch import Tensor

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.optional_output import warn_on_oserror
from espnet2_spear.spear.model import FBANK_RATE, PredictedTokens, Prediction
from espnet2_spear.train.checkpoint import RunState
from espnet2_spear.train.options import SpearTrainerOptions
from espnet2_spear.train.step import StepFigures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PERCENTILES = (50, 90, 99)
FAINT = 0.15  # opacity of a wrong prediction


class Progress:
    """Everything that shows a training: log, pictures, TensorBoard and wandb.

    Args:
        options: of the trainer.
        state: of the run; only its rank 0 shows anything.

    Attributes:
        train_writer: TensorBoard's, or None.
    """

    def __init__(self, options: SpearTrainerOptions, state: RunState) -> None:
        self.options, self.state = options, state
        self.folder = Path(options.output_dir)
        self.train_writer = self.valid_writer = None
        if options.use_tensorboard and state.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.train_writer, self.valid_writer = (
                SummaryWriter(str(self.folder / "tensorboard" / phase))
                for phase in ("train", "valid")
            )

    def begin_epoch(self, batches: int | None) -> None:
        """Count from here on.

        Args:
            batches: of an epoch; None if the iterator does not say.
        """
        self._epoch_batches = batches
        self._log_interval = self.options.log_interval or max(
            (batches or 2000) // 20, 10
        )
        # Seconds and batches of the last lines: speeds change during a training.
        self._speeds: deque[tuple[float, int]] = deque(maxlen=10)
        self._begin_line()

    def _begin_line(self) -> None:
        self._steps: list[StepFigures] = []
        self._since = time.perf_counter()

    def count(self, step: StepFigures, statistics: SubReporter) -> None:
        """Count a step; show those since the last line if it is time.

        Args:
            step: that was done last.
            statistics: of the epoch.
        """
        self._steps.append(step)
        line, before = (
            position // self._log_interval
            for position in (self.state.position, self.state.position - step.batches)
        )
        if line != before:
            if self.state.rank == 0:
                self._show(statistics)
            self._begin_line()

    def _show(self, statistics: SubReporter) -> None:
        """Log a line and add a point to the curves."""
        count = sum(step.batches for step in self._steps)
        norms = [x.grad_norm for x in self._steps if math.isfinite(x.grad_norm)]
        logging.info(self._line(statistics, count, norms))
        extra = {"hours_of_audio": self.state.samples / SAMPLE_RATE / 3600}
        if norms:
            for p in PERCENTILES:
                extra[f"grad_norm_p{p}"] = float(np.percentile(norms, p))
        if self.train_writer is not None:
            with warn_on_oserror("TensorBoard's curves"):
                statistics.tensorboard_add_scalar(self.train_writer, -count)
                for name, value in extra.items():
                    self.train_writer.add_scalar(name, value, statistics.total_count)
        if self.options.use_wandb:
            import wandb

            statistics.wandb_log(-count)
            wandb.log({f"train/{k}": v for k, v in extra.items()})

    def _line(self, statistics: SubReporter, count: int, norms: list[float]) -> str:
        """Say how the last ``count`` batches were, with their gradients' norms."""
        state, steps = self.state, self._steps
        seconds = max(time.perf_counter() - self._since, 1e-9)
        self._speeds.append((seconds, count))

        def mean(name: str) -> float:
            values = statistics.stats.get(name, [])[-count:]
            if not any(math.isfinite(v.value) and v.weight > 0 for v in values):
                return math.nan  # which aggregate says with a warning
            return aggregate(values)

        audio = sum(step.samples for step in steps) / SAMPLE_RATE
        of = f"/{self._epoch_batches}" if self._epoch_batches else ""
        parts = [
            f"epoch {state.epoch}/{self.options.max_epoch} batch {state.position}{of}",
            f"{state.samples / SAMPLE_RATE / 3600:.3g} h of audio",
            f"{sum(step.utts for step in steps) / seconds:.3g} utterances/s, "
            f"{audio / seconds:.0f} s of audio per s",
            f"masked {100 * mean('mask_ratio'):.0f} %, "
            f"padding {100 * mean('padding_waste'):.0f} %",
            f"loss {mean('loss'):.4g}",
        ]
        if skipped := steps[-1].skipped_utts:
            parts.insert(2, f"skipped utterances: {skipped:.0f}")
        for pair in (
            f"{d}_{t}" for d in state.model.domains for t in state.model.teachers
        ):
            loss = mean(f"{pair}_loss")
            if math.isfinite(loss):
                masked = 100 * mean(f"{pair}_acc_masked")
                unmasked = 100 * mean(f"{pair}_acc_unmasked")
                parts.append(
                    f"{pair.replace('_', ':')} {loss:.4g} acc {masked:.1f} % masked "
                    f"{unmasked:.1f} % not"
                )
        if norms:
            parts.append(f"grad norm {np.median(norms):.3g}")
        parts.append(f"lr {state.optimizer.param_groups[0]['lr']:.3g}")
        if self._epoch_batches:
            epochs = self.options.max_epoch - state.epoch + 1
            left = epochs * self._epoch_batches - state.position
            spent, done = (sum(x) for x in zip(*self._speeds, strict=True))
            ends = format_timespan(left * spent / max(done, 1), max_units=2)
            parts.append(f"ends in {ends}")
        return " | ".join(parts)

    def show_epoch(self, reporter: Reporter) -> None:
        """Log and draw the means of an epoch."""
        logging.info(reporter.log_message())
        if self.options.use_matplotlib:
            with warn_on_oserror(self.folder / "images"):
                reporter.matplotlib_plot(self.folder / "images")
        if self.train_writer is not None:
            with warn_on_oserror("TensorBoard's curves"):
                reporter.tensorboard_add_scalar(self.train_writer, key1="train")
                reporter.tensorboard_add_scalar(self.valid_writer, key1="valid")
        if self.options.use_wandb:
            reporter.wandb_log()

    def show_prediction(self, prediction: Prediction, utt: str) -> None:
        """Draw what is predicted of an utterance, where people look for it.

        That is ``predictions/<utterance>/<epoch>ep.png``, TensorBoard and wandb.
        """
        epoch = self.state.epoch
        figure = draw_prediction(prediction, f"{utt}, epoch {epoch}")
        path = self.folder / "predictions" / utt.replace("/", "_") / f"{epoch}ep.png"
        with warn_on_oserror(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        if self.train_writer is not None:
            with warn_on_oserror("TensorBoard's pictures"):
                self.train_writer.add_figure(f"predictions/{utt}", figure, epoch)
        if self.options.use_wandb and path.exists():
            import wandb

            wandb.log({f"predictions/{utt}": wandb.Image(str(path))})


def draw_prediction(prediction: Prediction, title: str) -> Figure:
    """Draw the masked fbank and, for each teacher, true and predicted tokens.

    A colour is a code; wrong predictions are faint. Beside them stands the accuracy
    of each codebook. Frames that were masked are marked in red below the fbank.

    Returns:
        a figure of matplotlib's; ``savefig`` it, or give it to TensorBoard.
    """
    from matplotlib.figure import Figure

    count = len(prediction.teachers)
    figure = Figure(figsize=(12, 2.2 + 3.2 * count), layout="constrained")
    grid = figure.add_gridspec(
        1 + 2 * count, 2, width_ratios=[5, 1], height_ratios=[1.4] + [1] * (2 * count)
    )
    axes = figure.add_subplot(grid[0, 0])
    frames = prediction.fbank.size(0)
    seconds = frames / FBANK_RATE
    axes.set_title(title)
    axes.imshow(
        prediction.fbank.T.numpy(),
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(0, seconds, 0, prediction.fbank.size(1)),
    )
    mels = prediction.fbank.size(1)
    mark = torch.tensor([1.0, 0.0, 0.0, 1.0]) * prediction.masked[None, :, None]
    axes.imshow(mark.numpy(), aspect="auto", extent=(0, seconds, 0, 0.05 * mels))
    axes.set_ylim(0, mels)
    axes.set_ylabel("fbank, masked")
    for row, (name, tokens) in enumerate(prediction.teachers.items()):
        top = figure.add_subplot(grid[1 + 2 * row, 0], sharex=axes)
        below = figure.add_subplot(grid[2 + 2 * row, 0], sharex=axes)
        _draw_tokens(top, tokens, tokens.true, tokens.true >= 0)
        _draw_tokens(below, tokens, tokens.predicted, tokens.predicted == tokens.true)
        top.set_ylabel(f"{name}\ntrue")
        below.set_ylabel(f"{name}\npredicted")
        side = figure.add_subplot(grid[1 + 2 * row : 3 + 2 * row, 1])
        _draw_accuracy(side, tokens)
    figure.axes[-2 if count else 0].set_xlabel("seconds")
    return figure


def _draw_tokens(
    axes: Axes, tokens: PredictedTokens, codes: Tensor, strong: Tensor
) -> None:
    from matplotlib import colormaps

    colours = colormaps["nipy_spectral"](codes.T.numpy() / tokens.codebook_size)
    colours[..., 3] = torch.where(strong, 1.0, FAINT).T.numpy()
    colours[(tokens.true < 0).T.numpy(), 3] = 0
    axes.imshow(
        colours,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(0, len(codes) / tokens.rate, -0.5, codes.size(1) - 0.5),
    )


def _draw_accuracy(axes: Axes, tokens: PredictedTokens) -> None:
    codebooks = torch.arange(tokens.true.size(1)).numpy()
    for masked, offset, label in ((True, -0.2, "masked"), (False, 0.2, "not masked")):
        share = 100 * tokens.accuracy(masked).nan_to_num(0).numpy()
        axes.barh(codebooks + offset, share, height=0.4, label=label)
    axes.set_xlim(0, 100)
    axes.set_yticks(codebooks)
    axes.set_xlabel("accuracy, %")
    axes.set_ylabel("codebook")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize="small")

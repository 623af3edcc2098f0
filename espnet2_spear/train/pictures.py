"""Pictures of what a student predicts, for those who watch a training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from espnet2_spear.fileio.optional_output import warn_on_oserror
from espnet2_spear.spear.model import FBANK_RATE, PredictedTokens, Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAINT = 0.15  # opacity of a wrong prediction


def show_prediction(
    prediction: Prediction,
    utt: str,
    epoch: int,
    folder: Path,
    summary_writer: Any = None,
    use_wandb: bool = False,
) -> None:
    """Draw a prediction where people look for it.

    Args:
        prediction: of an utterance.
        utt: its id.
        epoch: of the training.
        folder: gets ``<utt>/<epoch>ep.png``.
        summary_writer: of TensorBoard, or None.
        use_wandb: whether a run of wandb gets the picture, too.
    """
    figure = draw_prediction(prediction, f"{utt}, epoch {epoch}")
    path = folder / utt.replace("/", "_") / f"{epoch}ep.png"
    with warn_on_oserror(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    if summary_writer is not None:
        with warn_on_oserror("TensorBoard's pictures"):
            summary_writer.add_figure(f"predictions/{utt}", figure, epoch)
    if use_wandb and path.exists():
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

"""Pictures of what a student makes of a recording; needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor


def fbank_picture(fbank: Tensor) -> Figure:
    """Log-mel energies (T, bins) at 100 Hz over time."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes: Axes = figure.subplots()
    # Bins that no FFT bin falls into stand at the floor: not what the colours are for.
    low = float(np.quantile(fbank.numpy(), 0.05))
    image = axes.imshow(
        fbank.T.numpy(),
        origin="lower",
        aspect="auto",
        extent=(0, len(fbank) / 100, 0, fbank.size(1)),
        vmin=low,
        interpolation="nearest",
    )
    axes.set(xlabel="seconds", ylabel="mel bin", title="fbank")
    figure.colorbar(image, label="log energy")
    return figure


def similarity_picture(values: Tensor, kind: str) -> Figure:
    """How alike layers are, (L, L), with the numbers in it."""
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes: Axes = figure.subplots()
    image = axes.imshow(values.numpy(), vmin=min(0.0, float(values.min())), vmax=1)
    number = len(values)
    axes.set_xticks(range(number), range(number))
    axes.set_yticks(range(number), range(number))
    axes.set(xlabel="layer", ylabel="layer", title=f"similarity of layers: {kind}")
    if number <= 16:
        middle = (image.norm.vmin + image.norm.vmax) / 2
        for i in range(number):
            for j in range(number):
                value = float(values[i, j])
                axes.text(
                    j,
                    i,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if value < middle else "black",
                )
    figure.colorbar(image)
    return figure


def token_picture(tokens: Mapping[str, Tensor], seconds: float) -> Figure:
    """Codes (T, N) of each source over time, a row a codebook, a colour a code."""
    heights = [max(2, codes.size(1)) for codes in tokens.values()]
    figure = Figure(figsize=(9, 0.8 + 0.28 * sum(heights)), layout="constrained")
    rows = figure.subplots(
        len(tokens), 1, squeeze=False, sharex=True, height_ratios=heights
    )
    for (axes,), (name, codes) in zip(rows, tokens.items(), strict=True):
        axes.imshow(
            codes.T.numpy(),
            aspect="auto",
            cmap="nipy_spectral",
            interpolation="nearest",
            extent=(0, seconds, codes.size(1) - 0.5, -0.5),
        )
        axes.set(ylabel="codebook", title=f"tokens: {name}")
    rows[-1][0].set_xlabel("seconds")
    return figure

#!/usr/bin/env python3
"""Print and plot which layers of the student a trained model listens to."""

from __future__ import annotations

import argparse
import logging
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from espnet2_spear.errors import CheckpointError, UserError
from espnet2_spear.fileio.explain import command, option_parser
from espnet2_spear.hub.infer import infer_config
from espnet2_spear.hub.load import PARTS, Checkpoint, read_any_checkpoint
from espnet2_spear.zipformer.config import ZipformerConfig

KEY = "featurizer.weights"


class Layer(NamedTuple):
    """One layer and its share in the features.

    Attributes:
        weight: share, all of them add up to 1.
        stack: of the Zipformer, from 0.
        rate: frames per second at which it works.
    """

    weight: float
    stack: int
    rate: float


def read_layers(model: Checkpoint) -> tuple[list[Layer], bool]:
    """Read the weights of an ESPnet model with frontend ``spear``.

    Returns:
        the layers, and whether they are normalised before the sum: only then do the
        weights alone say how much a layer counts.

    Raises:
        UserError: another frontend, a single layer, or weights of another network.
    """
    if "frontend" not in model.students:
        raise UserError(
            f"{model.settings_file or model.file}: is no configuration with frontend: "
            "spear, nor has one beside it; name the weights of such a training"
        )
    conf = model.settings.get("frontend_conf") or {}
    if conf.get("layer") is not None:
        raise UserError(
            f"{model.settings_file}: frontend_conf.layer is {conf['layer']}: there are "
            "no weights, all features come from that layer"
        )
    config = model.students["frontend"]
    if not isinstance(config, ZipformerConfig):  # the tensors tell its sizes
        prefix = next(prefix for prefix, part in PARTS.items() if part == "frontend")
        student = {
            key.removeprefix(prefix): tensor
            for key, tensor in model.tensors.items()
            if key.startswith(prefix)
        }
        config = infer_config(student, model.file)
    places = [
        (stack, 50.0 / config.downsampling_factor[stack])
        for stack, count in enumerate(config.num_encoder_layers)
        for _ in range(count)
    ]
    found = [v for k, v in model.tensors.items() if k.endswith(f"frontend.{KEY}")]
    if [tuple(tensor.shape) for tensor in found] != [(len(places),)]:
        raise CheckpointError(
            f"{model.file}: holds {len(found)} tensors named *frontend.{KEY}, expected "
            f"one, of {len(places)} layers; name the weights of the whole model (such "
            "as valid.acc.best.pth)"
        )
    weights = found[0].float().softmax(dim=0).tolist()
    layers = [Layer(w, *place) for w, place in zip(weights, places, strict=True)]
    return layers, bool(conf.get("layer_norm", True))


def table(layers: list[Layer]) -> str:
    """Lines of text: layer, stack, frame rate, weight in percent and as a bar."""
    highest = max(layer.weight for layer in layers)
    lines = ["layer  stack  Hz     weight"]
    for index, (weight, stack, rate) in enumerate(layers):
        place = f"{stack:<6} {rate:g}"
        bar = "#" * round(40 * weight / highest)
        lines.append(f"{index:<6} {place:<13} {100 * weight:5.1f} %  {bar}")
    return "\n".join(lines)


def plot(layers: list[Layer], path: Path, title: str) -> None:
    """Write a bar chart, one colour per stack; the line is equal weights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 0.4 * len(layers), 3.5), layout="constrained")
    axes = figure.subplots()
    for place, group in groupby(enumerate(layers), key=lambda item: item[1][1:]):
        numbers, own = zip(*group, strict=True)
        label = "stack {}, {:g} Hz".format(*place)
        axes.bar(numbers, [100 * layer.weight for layer in own], label=label)
    axes.axhline(100 / len(layers), color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(layers)))
    axes.set(xlabel="layer", ylabel="weight, %", title=title)
    figure.legend(loc="outside right upper", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = option_parser(
        "Print and plot the layer weights that a model with frontend spear has learned"
    )
    parser.add_argument(
        "model", help="weights (.pth) with their config.yaml beside; or a packed model"
    )
    parser.add_argument(
        "--png",
        type=Path,
        help="Where to draw them (layer_weights.png beside the model)",
    )
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Print and plot; see ``--help``.

    Raises:
        UserError: a model without learned layer weights.
        CheckpointError: a file that cannot be read.
    """
    model = read_any_checkpoint(args.model)
    layers, normed = read_layers(model)
    print(table(layers))
    if not normed:
        print(
            "layer_norm is false: layers differ in scale, so that weights alone do not "
            "say how much a layer counts"
        )
    file = model.file
    png = args.png or (file if file.is_dir() else file.parent) / "layer_weights.png"
    try:
        plot(layers, png, file.name)
    except ImportError:
        logging.warning("no picture: pip install matplotlib")
        return
    print(f"Drawn in {png}")


if __name__ == "__main__":
    main()

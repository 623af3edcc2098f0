#!/usr/bin/env python3
"""Print and plot which layers of the student a trained model listens to."""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from espnet2_spear.errors import UserError
from espnet2_spear.hub.files import CheckpointError, read_config, read_tensors
from espnet2_spear.hub.packed import is_packed, read_meta, unpack_model
from espnet2_spear.zipformer.config import ZipformerConfig

KEY = "featurizer.weights"


class WeightsError(UserError):
    """A model without learned layer weights; names the file and the reason."""


@dataclass(frozen=True)
class Layer:
    """One layer and its share in the features.

    Attributes:
        index: from 0, as ``frontend_conf.layer`` counts.
        stack: of the Zipformer, from 0; None: unknown.
        rate: frames per second at which it works; None: unknown.
        weight: share, all of them add up to 1.
    """

    index: int
    stack: int | None
    rate: float | None
    weight: float


def read_layers(config_file: Path, model_file: Path) -> tuple[list[Layer], bool]:
    """Read the weights of an ESPnet model with frontend ``spear``.

    Args:
        config_file: its ``config.yaml``.
        model_file: its weights (``.pth``).

    Returns:
        the layers, and whether they are normalised before the sum: only then do the
        weights alone say how much a layer counts.

    Raises:
        WeightsError: another frontend, or a single layer.
        CheckpointError: a file that cannot be read.
    """
    try:
        config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{config_file}: cannot be read ({error})") from error
    conf = config.get("frontend_conf") if isinstance(config, dict) else None
    if conf is None or config.get("frontend") != "spear":
        raise WeightsError(f"{config_file}: is no configuration with frontend: spear")
    if conf.get("layer") is not None:
        raise WeightsError(
            f"{config_file}: frontend_conf.layer is {conf['layer']}: there are no "
            "weights, all features come from that layer"
        )
    weights = _find(read_tensors(model_file), model_file).float().softmax(dim=0)
    places = _places(conf, len(weights))
    layers = [
        Layer(i, *place, weight)
        for i, (place, weight) in enumerate(zip(places, weights.tolist(), strict=True))
    ]
    return layers, bool(conf.get("layer_norm", True))


def _find(state: dict[str, Tensor], path: Path) -> Tensor:
    found = [k for k in state if k.endswith(f"frontend.{KEY}")]
    if len(found) != 1 or state[found[0]].dim() != 1:
        raise WeightsError(
            f"{path}: holds {len(found)} tensors named *frontend.{KEY}, expected one; "
            "name the weights of the whole model (such as valid.acc.best.pth)"
        )
    return state[found[0]]


def _places(conf: dict[str, Any], layers: int) -> list[tuple[int | None, float | None]]:
    """Stack and frame rate of every layer, as far as they are known."""
    config = None
    if conf.get("arch") is not None:
        config = ZipformerConfig.build(conf["arch"])
    elif conf.get("ckpt") is not None:
        ckpt = Path(conf["ckpt"])
        folder = ckpt if ckpt.is_dir() else ckpt.parent
        for name in ("config.yaml", "config.json"):
            if (folder / name).is_file():
                config = read_config(folder / name)
                break
    if config is None or sum(config.num_encoder_layers) != layers:
        return [(None, None)] * layers
    return [
        (stack, 50.0 / config.downsampling_factor[stack])
        for stack, count in enumerate(config.num_encoder_layers)
        for _ in range(count)
    ]


def table(layers: list[Layer]) -> str:
    """Lines of text: layer, stack, frame rate, weight in percent and as a bar."""
    highest = max(layer.weight for layer in layers)
    lines = ["layer  stack  Hz     weight"]
    for layer in layers:
        stack = "-" if layer.stack is None else layer.stack
        rate = "-" if layer.rate is None else f"{layer.rate:g}"
        bar = "#" * round(40 * layer.weight / highest)
        lines.append(
            f"{layer.index:<6} {stack:<6} {rate:<6} {100 * layer.weight:5.1f} %  {bar}"
        )
    return "\n".join(lines)


def plot(layers: list[Layer], path: Path, title: str) -> None:
    """Write a bar chart, one colour per stack; the line is equal weights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 0.4 * len(layers), 3.5), layout="constrained")
    axes = figure.subplots()
    for stack in sorted({layer.stack or 0 for layer in layers}):
        own = [layer for layer in layers if (layer.stack or 0) == stack]
        rate = own[0].rate
        axes.bar(
            [layer.index for layer in own],
            [100 * layer.weight for layer in own],
            label=None if rate is None else f"stack {stack}, {rate:g} Hz",
        )
    axes.axhline(100 / len(layers), color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks([layer.index for layer in layers])
    axes.set(xlabel="layer", ylabel="weight, %", title=title)
    if layers[0].rate is not None:
        figure.legend(loc="outside right upper", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        description="Print and plot the layer weights that a model with frontend spear "
        "has learned",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "model",
        type=Path,
        nargs="+",
        help="config.yaml and weights (.pth) of a training; or a packed model",
    )
    parser.add_argument(
        "--png",
        type=Path,
        help="Where to draw them (layer_weights.png beside the model)",
    )
    return parser


def main(cmd: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = get_parser()
    args = parser.parse_args(cmd)
    try:
        with tempfile.TemporaryDirectory(prefix="spear-") as work:
            if len(args.model) == 1:
                layers, normed = _read_packed(args.model[0], Path(work) / "model")
            elif len(args.model) == 2:
                layers, normed = read_layers(*args.model)
            else:
                parser.error("name one packed model, or config.yaml and weights")
    except (WeightsError, CheckpointError) as error:
        print(f"spear_layer_weights: {error}", file=sys.stderr)
        return 1
    print(table(layers))
    if not normed:
        print(
            "layer_norm is false: layers differ in scale, so that weights alone do not "
            "say how much a layer counts"
        )
    png = args.png or _beside(args.model[-1])
    try:
        plot(layers, png, args.model[-1].name)
    except ImportError:
        print("No picture: pip install matplotlib", file=sys.stderr)
        return 0
    print(f"Drawn in {png}")
    return 0


def _beside(model: Path) -> Path:
    return (model if model.is_dir() else model.parent) / "layer_weights.png"


def _read_packed(path: Path, folder: Path) -> tuple[list[Layer], bool]:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if not is_packed(path):
        raise WeightsError(f"{path}: is no packed model; name config.yaml and weights")
    if path.is_dir():
        folder = path
    else:
        unpack_model(path, folder)
    configs, weights = read_meta(path, folder)
    for key, config in configs.items():
        # asr_train_config and asr_model_file, train_config and model_file, ...
        model = weights.get(key.removesuffix("train_config") + "model_file")
        if model is not None and "frontend" in config.read_text(encoding="utf-8"):
            return read_layers(config, model)
    raise WeightsError(f"{path}: holds no model with a frontend")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())

"""Open SPEAR checkpoints: ours, or in the released Hugging Face layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import Tensor

from espnet2_spear.spear.encoder import SpearEncoder
from espnet2_spear.zipformer.config import ZipformerConfig

# Keys of a released config.json that say nothing about the network.
_HF_ONLY = ("architectures", "model_type", "auto_map", "torch_dtype", "dtype")
_HF_ONLY += ("transformers_version",)
_ANCHOR = "encoder_embed.conv.0.weight"
_WEIGHT_NAMES = ("valid.loss.ave.pth", "valid.loss.best.pth", "latest.pth")


class CheckpointError(ValueError):
    """A checkpoint that cannot be opened; the message names the file and remedy."""


def load_model(path: str | Path, padding: str | None = None) -> SpearEncoder:
    """Open a SPEAR student, in eval mode, on the CPU.

    Args:
        path: a folder in the released layout (``config.json`` and
            ``model.safetensors``), an experiment folder or packed model of ours
            (``config.yaml`` and weights), or one of our ``.pth`` files with
            ``config.yaml`` beside it. Nothing is downloaded.
        padding: ``exact`` makes an utterance's output independent of its batch,
            ``compatible`` is as in the published code; None takes what the
            checkpoint's configuration says (``compatible`` if nothing).

    Returns:
        the encoder; ``model(speech, lengths)`` gives ``encoder_out``,
        ``encoder_out_lens`` and ``hidden_states``.

    Raises:
        CheckpointError: no checkpoint there, or one with missing, extra or
            misshapen tensors.
        ConfigError: a ``padding`` that does not exist.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or folder; name a local checkpoint (nothing is "
            "downloaded by itself)"
        )
    config_file, weights = _find(path)
    config = read_config(config_file)
    if padding is not None:
        config = replace(config, padding=padding)
    state = strip_prefix(read_tensors(weights), weights)
    model = SpearEncoder(config)
    check_tensors(state, model.state_dict(), weights)
    model.load_state_dict(state)
    return model.eval()


def _find(path: Path) -> tuple[Path, Path]:
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        names = ("model.safetensors", *_WEIGHT_NAMES)
        weights = [folder / n for n in names if (folder / n).exists()]
        if not weights:
            raise CheckpointError(f"{folder}: holds none of {', '.join(names)}")
        path = weights[0]
    name = "config.json" if path.suffix == ".safetensors" else "config.yaml"
    config = folder / name
    if not config.exists():
        raise CheckpointError(f"{path}: needs {name} beside it in {folder}")
    return config, path


def read_config(path: Path) -> ZipformerConfig:
    """Read a released ``config.json`` or the ``config.yaml`` of a SpearTask run."""
    released = path.suffix == ".json"
    try:
        text = path.read_text(encoding="utf-8")
        conf = json.loads(text) if released else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); copy the file again"
        ) from error
    if not isinstance(conf, dict) or not (released or "student_conf" in conf):
        raise CheckpointError(f"{path}: not the configuration of a SPEAR model")
    if released:
        conf = {k: v for k, v in conf.items() if k not in _HF_ONLY}
    else:
        conf = {"name": conf["student"], **conf["student_conf"]}
    try:
        return ZipformerConfig.from_dict(conf)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a flat state dict without executing anything that the file holds."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read as tensors ({error}); copy the file again"
        ) from error
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(state).__name__}, not named tensors; this is not a "
            "SPEAR checkpoint"
        )
    if isinstance(state.get("model"), Mapping):  # an ESPnet checkpoint.pth
        state = state["model"]
    return state


def strip_prefix(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Keep the student's tensors, under the names of SpearEncoder.

    The prefix (``model.model.`` in released files, ``student.`` in ours) is found by
    a tensor that every student has.
    """
    prefixes = [k.removesuffix(_ANCHOR) for k in state if k.endswith(_ANCHOR)]
    if len(prefixes) != 1:
        raise CheckpointError(
            f"{path}: found {len(prefixes)} tensors named *{_ANCHOR}, expected one; "
            "this is not a SPEAR checkpoint"
        )
    start = len(prefixes[0])
    return {k[start:]: v for k, v in state.items() if k.startswith(prefixes[0])}


def check_tensors(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path
) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: lists the first missing, extra and misshapen tensors.
    """
    problems = [f"missing {k}" for k in expected if k not in state]
    problems += [f"extra {k}" for k in state if k not in expected]
    problems += [
        f"{k} has shape {tuple(state[k].shape)}, expected {tuple(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    if problems:
        shown = "; ".join(problems[:5])
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{path}: does not fit its configuration: {shown}{more}")

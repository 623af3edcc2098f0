"""Files of checkpoints in every layout: found, and read without executing anything."""

from __future__ import annotations

import json
import pathlib
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from espnet2_spear.errors import UserError
from espnet2_spear.zipformer.config import ZipformerConfig

# In this order: safetensors before pickles, what was published before what we wrote.
RELEASED_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
RELEASED_WEIGHTS += ("pytorch_model.bin", "pytorch_model.bin.index.json")
OUR_WEIGHTS = ("student.pth", "valid.loss.ave.pth", "valid.loss.best.pth", "latest.pth")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
INDEX_SUFFIX = ".index.json"
SHARD = re.compile(r"-\d{5}-of-\d{5}\.(safetensors|bin)$")

# Keys of a released config.json that say nothing about the network.
_HF_ONLY = ("architectures", "model_type", "auto_map", "torch_dtype", "dtype")
_HF_ONLY += ("transformers_version", "_name_or_path", "_commit_hash", "return_dict")
_HF_ONLY += ("output_hidden_states", "output_attentions", "hidden_size")
_HF_ONLY += ("num_hidden_layers",)
# What to do about tensors that make no student.
REMEDY = "copy the file again, or name that of a SPEAR student"
_OUR_KEYS = ("student", "student_conf")  # of a SpearTask's config.yaml

# Classes besides tensors and plain values that icefall leaves in its checkpoints, by
# the name in the file. Making such an object executes nothing of the file's.
_SAFE = [
    *[(pathlib.PosixPath, f"{m}.PosixPath") for m in ("pathlib", "pathlib._local")],
    *[
        (pathlib.PureWindowsPath, f"{m}.WindowsPath")
        for m in ("pathlib", "pathlib._local")
    ],
    *[pathlib.PurePosixPath, Decimal, defaultdict, Counter, dict, list, int, float],
]


class CheckpointError(UserError):
    """A checkpoint that cannot be opened; the message names the file and remedy."""


def find_weights(path: Path) -> Path:
    """Return the file that holds the tensors, or their index.

    Args:
        path: that file itself, or a folder with one under a known name, or with
            no more than one file of weights under any name.

    Raises:
        CheckpointError: nothing there, or no way to choose.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or folder; name a local checkpoint (nothing is "
            "downloaded by itself; hf:USER/NAME fetches one from Hugging Face)"
        )
    if path.is_file():
        if SHARD.search(path.name):
            raise CheckpointError(
                f"{path}: one part of several; name their folder or *{INDEX_SUFFIX}"
            )
        return path
    names = (*RELEASED_WEIGHTS, *OUR_WEIGHTS)
    for name in names:
        if (path / name).exists():
            return path / name
    others = sorted(p.name for p in path.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    if len(others) == 1 and not SHARD.search(others[0]):
        return path / others[0]
    found = f"; it has {', '.join(others[:5])}: name one of them" if others else ""
    raise CheckpointError(f"{path}: holds none of {', '.join(names)}{found}")


def find_config(weights: Path) -> Path | None:
    """Return the configuration beside a file of weights, if there is one."""
    names = ["config.yaml", "config.json"]
    if weights.suffix in (".safetensors", ".bin", ".json"):
        names.reverse()
    found = [
        weights.parent / name for name in names if (weights.parent / name).exists()
    ]
    return found[0] if found else None


def read_config(path: Path) -> ZipformerConfig:
    """Read a released ``config.json`` or the ``config.yaml`` of a SpearTask run.

    Raises:
        CheckpointError: unreadable, of something else, with unknown keys, or with
            values that do not fit together (stack lists of unequal lengths, ...).
    """
    released = path.suffix == ".json"
    conf = read_content(path)
    if released and isinstance(conf, dict):
        conf = {k: v for k, v in conf.items() if k not in _HF_ONLY}
    elif not released and isinstance(conf, dict) and {*_OUR_KEYS} <= conf.keys():
        name, conf = (conf[key] for key in _OUR_KEYS)
        if isinstance(conf, dict):
            conf = {"name": name, **conf}
    else:
        wanted = "" if released else f" ({', '.join(_OUR_KEYS)})"
        raise CheckpointError(
            f"{path}: not the configuration of a SPEAR model{wanted}; copy the one "
            "that belongs to the weights, or move it away: the tensors tell the sizes"
        )
    try:
        return ZipformerConfig.from_dict(conf)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_content(path: Path) -> Any:
    """Read what a ``.json`` file, or one of YAML, holds.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); copy the file again"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read named tensors without executing anything that the file holds.

    Args:
        path: safetensors, or a pickle of torch.save: flat, or with the tensors under
            ``model`` or ``state_dict`` as training checkpoints have them; or the
            ``*.index.json`` of either kind in several parts.

    Raises:
        CheckpointError: the file is damaged, holds something else, or holds objects
            that could only be read by executing code.
    """
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = _read_pickle(path)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read as tensors ({error}); copy the file again"
        ) from error
    for key in ("model", "state_dict"):  # a training checkpoint
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(state).__name__}, not named tensors; this is not a "
            "SPEAR checkpoint"
        )
    other = [str(k) for k, v in state.items() if not isinstance(v, Tensor)]
    if other:
        raise CheckpointError(
            f"{path}: {', '.join(other[:5])}: not tensors; this is not a SPEAR "
            "checkpoint"
        )
    return dict(state)


def _read_pickle(path: Path) -> Any:
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    # An optimizer's state beside the model need not be read into memory.
    options["mmap"] = zipfile.is_zipfile(path)
    with torch.serialization.safe_globals(_SAFE):
        try:
            return torch.load(path, **options)
        except Exception as error:
            refused = _refused_classes(path)
            if not refused:
                raise
            raise CheckpointError(
                f"{path}: holds objects that only code of theirs could restore "
                f"({', '.join(refused[:5])}), which is not executed. If you trust the "
                "file, keep its tensors alone, where these classes are installed: "
                'c = torch.load(FILE, weights_only=False); torch.save({"model": '
                'c["model"]}, NEW)'
            ) from error


def _refused_classes(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # damaged, or of the format before torch 1.6
        return []


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Read the parts that an index names, and check that they hold what it says."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        where = {str(k): str(v) for k, v in content["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index}: no index of weights ({error}); copy the file again"
        ) from error
    state: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        part = index.parent / name
        if Path(name).name != name or not part.is_file():
            raise CheckpointError(f"{index}: its part {name} is not in the folder")
        state.update(read_tensors(part))
    differ = sorted(where.keys() ^ state.keys())
    if differ:
        raise CheckpointError(
            f"{index}: its parts do not hold what it lists: {', '.join(differ[:5])}; "
            "copy all files again"
        )
    return state

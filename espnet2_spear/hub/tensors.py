"""Tensors and configurations of strangers' files, read without executing anything."""

from __future__ import annotations

import json
import pathlib
import zipfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from espnet2_spear.errors import CheckpointError
from espnet2_spear.fileio.explain import some
from espnet2_spear.hub.fetch import INDEX_SUFFIX

AGAIN = "download the file again"
# Where training checkpoints keep the tensors. The average of icefall's training goes
# before the last step, as in its own decoding.
NESTED = ("model_avg", "model", "state_dict")

# Classes besides tensors and plain values that icefall leaves in its checkpoints, by
# the name in the file. Making such an object executes nothing of the file's.
_SAFE: list[Any] = [pathlib.PurePosixPath, Decimal, defaultdict, Counter]
_SAFE += [dict, list, int, float]
for _module in ("pathlib", "pathlib._local"):
    _SAFE.append((pathlib.PosixPath, f"{_module}.PosixPath"))
    _SAFE.append((pathlib.PureWindowsPath, f"{_module}.WindowsPath"))


def read_settings(path: Path) -> Any:
    """Read what a ``.json`` file, or one of YAML, holds.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {AGAIN}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read named tensors.

    Args:
        path: safetensors, or a pickle of torch.save: flat, or a training checkpoint
            with the tensors under one of ``NESTED``; or the ``*.index.json`` of either
            kind in several parts.

    Returns:
        the tensors, and under which key of ``NESTED`` they were ("": none).

    Raises:
        CheckpointError: the file is damaged, holds something else, or holds objects
            that could only be read by executing code.
    """
    if path.name.endswith(INDEX_SUFFIX):
        return _read_parts(path), ""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path), ""
        state = _read_pickle(path)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read as tensors ({error}); {AGAIN}"
        ) from error
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(state).__name__}, not named tensors; this is not a "
            "SPEAR checkpoint"
        )
    found = next((k for k in NESTED if isinstance(state.get(k), Mapping)), "")
    state = state[found] if found else state
    other = [str(k) for k, v in state.items() if not isinstance(v, Tensor)]
    if other:
        raise CheckpointError(
            f"{path}: {some(other)}: not tensors; this is not a SPEAR checkpoint"
        )
    return dict(state), found


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
                f"({some(refused)}), which is not executed. If you trust the "
                "file, keep its tensors alone, where these classes are installed: "
                'c = torch.load(FILE, weights_only=False); torch.save({"model": '
                'c["model"]}, NEW)'
            ) from error


def _refused_classes(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # damaged, or of the format before torch 1.6
        return []


def _read_parts(index: Path) -> dict[str, Tensor]:
    """Read the parts that an index names, and check that they hold what it says."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        where = {str(k): str(v) for k, v in content["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index}: no index of weights ({error}); {AGAIN}"
        ) from error
    state: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        part = index.parent / name
        if Path(name).name != name or not part.is_file():
            raise CheckpointError(f"{index}: its part {name} is not in the folder")
        state.update(read_tensors(part)[0])
    differ = sorted(where.keys() ^ state.keys())
    if differ:
        raise CheckpointError(
            f"{index}: its parts do not hold what it lists: {some(differ)}; "
            "download all files again"
        )
    return state

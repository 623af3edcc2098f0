"""Write a student in our format: config.yaml and weights for ESPnet's --init_param."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from torch import Tensor

from espnet2_spear.errors import CheckpointError
from espnet2_spear.fileio.atomic import atomic
from espnet2_spear.hub.infer import compact, named_size
from espnet2_spear.spear.student import SpearEncoder

WEIGHTS = "student.pth"
PREFIX = "student"  # of the names in the file; no other name starts with it


def save_student(
    model: SpearEncoder, folder: Path, source: str, overwrite: bool = False
) -> Path:
    """Write a folder that ``load_model`` and ``--init_param`` take.

    Names are those of a SpearTask's checkpoint, ``student.encoder.*`` and so on:
    ESPnet finds tensors by the start of their names, and ``encoder`` alone would take
    ``encoder_embed`` for its own.

    Args:
        model: the student.
        folder: made if need be.
        source: where it comes from, noted in ``config.yaml``.
        overwrite: replace a student that is there.

    Returns:
        the file of weights, ``student.pth``.

    Raises:
        CheckpointError: a student is there, or weights that are no finite numbers.
    """
    weights, config_file = folder / WEIGHTS, folder / "config.yaml"
    there = [str(p) for p in (weights, config_file) if p.exists()]
    if there and not overwrite:
        raise CheckpointError(f"{', '.join(there)}: exists; choose another folder")
    state = model.state_dict()
    refuse_non_finite(state, source)
    with atomic(weights) as file:
        torch.save({f"{PREFIX}.{k}": v for k, v in state.items()}, file)
    conf = {
        "student": named_size(model.config) or "base",
        "student_conf": model.config.to_dict(),
    }
    comment = "".join(f"# {line}\n" for line in f"from {source}".splitlines())
    with atomic(config_file, "w") as file:
        file.write(comment)
        yaml.safe_dump(conf, file, sort_keys=False, default_flow_style=None)
    return weights


def refuse_non_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError for weights that are no finite numbers."""
    bad = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(
            f"{source}: {', '.join(bad[:5])} hold NaN or infinity; the training that "
            "left it had failed, take an earlier checkpoint"
        )


def init_param_help(model: SpearEncoder, weights: Path) -> str:
    """Return the options by which ESPnet loads what :func:`save_student` wrote."""
    arch = yaml.safe_dump(
        compact(model.config), default_flow_style=True, sort_keys=False, width=10_000
    ).strip()
    source = f"--init_param {weights}:{PREFIX}:"
    return f"""\
As a frontend (any task; asr.sh --python spear-python), in the training configuration:
    frontend: spear
    frontend_conf: {{ckpt: {weights.parent}}}
    normalize: null
  or, so that no file but the model's own is needed later:
    frontend_conf: {{arch: {arch}}}
  and {source}frontend.upstream
As an encoder, fine-tuned:
    frontend: null
    input_size: 1
    normalize: null
    encoder: zipformer
    encoder_conf: {{arch: {arch}}}
  and {source}encoder
Either way in speech recognition, that stage 10 of asr.sh does not run the student:
    model_conf: {{extract_feats_in_collect_stats: false}}
  and for asr.sh --feats_normalize none
To go on with pre-training (spear_train), the student alone:
    {source}student
"""

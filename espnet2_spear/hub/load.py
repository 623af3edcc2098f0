"""Open SPEAR checkpoints: ours, or released ones."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from espnet2_spear.hub.fetch import local_path
from espnet2_spear.hub.files import (
    REMEDY,
    CheckpointError,
    find_config,
    find_weights,
    read_config,
    read_tensors,
)
from espnet2_spear.hub.infer import differences, infer_config
from espnet2_spear.hub.packed import check_stamp_beside, is_packed, opened_student
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import ZipformerConfig

__all__ = ["CheckpointError", "load_model", "open_checkpoint"]

_ANCHOR = "encoder_embed.conv.0.weight"
_OURS = "student."
# Of icefall's training: they predict codes and tags, and nothing here uses them.
_HEADS = re.compile(
    r"(^|\.)(codebook_loss_net|codebook_loss_heads|audio_tagging_proj)\."
)


def load_model(
    path: str | Path,
    padding: str | None = None,
    conf: Mapping[str, Any] | None = None,
) -> SpearEncoder:
    """Open a SPEAR student, in eval mode, on the CPU.

    Args:
        path: a folder, or a file of weights in it: as released on Hugging Face
            (``model.safetensors``, whole or in parts, or ``pytorch_model.bin``), a
            training checkpoint of icefall (``.pt``), what ``spear_import`` writes, or
            an experiment of ours. A packed model (``.zip``, ``.tgz``), unpacked safely
            for as long as it is read, or the folder of an unpacked one. Or
            ``hf:user/name[@revision][:file]``, which is fetched; nothing else ever is.
        padding: ``exact`` makes an utterance's output independent of its batch,
            ``compatible`` is as in the published code; None takes what the
            checkpoint's configuration says (``compatible`` if nothing).
        conf: fields of ZipformerConfig that go before the ``config.json`` or
            ``config.yaml`` beside the weights. Without such a file the tensors
            themselves tell the architecture, see ``infer_config``.

    Returns:
        the encoder; ``model(speech, lengths)`` gives ``encoder_out``,
        ``encoder_out_lens`` and ``hidden_states``.

    Raises:
        CheckpointError: no checkpoint there; one with missing, extra or misshapen
            tensors; a configuration that contradicts them; one packed in a newer
            format.
        ConfigError: a ``padding`` that does not exist, or a ``conf`` that does not
            fit.
    """
    conf = dict(conf or {})
    if padding is not None:
        conf["padding"] = padding
    return open_checkpoint(path, conf)[0]


def open_checkpoint(
    path: str | Path, conf: Mapping[str, Any] | None = None
) -> tuple[SpearEncoder, Path, list[str]]:
    """Open a student, and say what was opened.

    Args:
        path: as of :func:`load_model`.
        conf: as of :func:`load_model`.

    Returns:
        the encoder in eval mode, the file its tensors are from, and the names of the
        tensors that are not the student's (heads) and were left out.
    """
    local = local_path(path)
    if is_packed(local):
        with opened_student(local) as file:
            model, _, left_out = open_checkpoint(file, conf)
            return model, local, left_out
    weights = find_weights(local)
    check_stamp_beside(weights)
    config_file = find_config(weights)
    known = None if config_file is None else read_config(config_file)
    state, left_out = strip_prefix(read_tensors(weights), weights)
    if known is None:
        config = infer_config(state, weights, conf)
    else:
        config = known.changed(conf or {})
    with torch.device("meta"):  # no memory for what a damaged configuration asks
        expected = SpearEncoder(config).state_dict()
    try:
        check_tensors(state, expected, weights)
    except CheckpointError as error:
        hint = f"; {REMEDY}"
        if config_file is not None:
            hint = _contradiction(config, state, config_file)
            hint += (
                f"; take the {config_file.name} that belongs to the file, or move it "
                "away: the tensors tell the sizes"
            )
        raise CheckpointError(f"{error}{hint}") from None
    _tell_widened(state, weights)
    model = SpearEncoder(config)
    model.load_state_dict(state)
    return model.eval(), weights, left_out


def _tell_widened(state: Mapping[str, Tensor], path: Path) -> None:
    """Log that tensors of another precision become float32, which the model is in."""
    kinds = Counter(value.dtype for value in state.values())
    others = {k: n for k, n in kinds.items() if k != torch.float32}
    for kind, number in others.items():
        logging.warning(
            f"{path}: {number} of {len(state)} tensors are "
            f"{str(kind).removeprefix('torch.')} and are turned into float32"
        )


def strip_prefix(
    state: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Keep the student's tensors, under the names of SpearEncoder.

    The prefix (``model.model.`` in released files, ``student.`` in ours, none in
    icefall's) is found by a tensor that every student has.

    Returns:
        the student's tensors, and the names of those that belong to no student: what
        a SpearTask trains besides, and icefall's heads.

    Raises:
        CheckpointError: no student, several, or tensors of unknown purpose.
    """
    prefixes = [k.removesuffix(_ANCHOR) for k in state if k.endswith(_ANCHOR)]
    if _OURS in prefixes:
        prefixes = [_OURS]
    if len(prefixes) != 1:
        raise CheckpointError(
            f"{path}: found {len(prefixes)} tensors named *{_ANCHOR}, expected one; "
            f"this is not a SPEAR checkpoint: {REMEDY}"
        )
    (prefix,) = prefixes
    left_out = [k for k in state if _HEADS.search(k) or not k.startswith(prefix)]
    unknown = [k for k in left_out if prefix != _OURS and not _HEADS.search(k)]
    if unknown:
        raise CheckpointError(
            f"{path}: extra tensors beside {prefix}*: {_some(unknown)}; this is more "
            f"than a SPEAR student: {REMEDY}"
        )
    left_out += [k for k in state if k == f"{prefix}schedule.batches"]
    dropped = {*left_out}
    kept = {k[len(prefix) :]: v for k, v in state.items() if k not in dropped}
    return kept, left_out


def check_tensors(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path
) -> None:
    """Compare names, shapes and kinds of numbers.

    Raises:
        CheckpointError: lists the first missing, extra and misshapen tensors.
    """
    problems = [f"missing {k}" for k in expected if k not in state]
    problems += [f"extra {k}" for k in state if k not in expected]
    for name, value in expected.items():
        got = state.get(name)
        if got is None:
            continue
        if got.shape != value.shape:
            shapes = f"{tuple(got.shape)}, expected {tuple(value.shape)}"
            problems.append(f"{name} has shape {shapes}")
        elif not got.is_floating_point():
            problems.append(f"{name} holds {got.dtype}, expected floats")
    if problems:
        raise CheckpointError(
            f"{path}: does not fit its configuration: {_some(problems, '; ')}"
        )


def _contradiction(
    config: ZipformerConfig, state: Mapping[str, Tensor], config_file: Path
) -> str:
    """Say which fields of a configuration the tensors contradict, if they can tell."""
    heads = {
        key: getattr(config, key)
        for key in ("query_head_dim", "pos_head_dim", "value_head_dim")
    }
    try:
        differ = differences(config, infer_config(state, config_file, heads))
    except CheckpointError:
        return ""
    found = [
        f"{key} {_plain(says)} there, {_plain(seen)} by the tensors"
        for key, (says, seen) in differ.items()
    ]
    if not found:
        return ""
    return f". {config_file.name} contradicts the tensors: {_some(found, '; ')}"


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _some(items: list[str], separator: str = ", ") -> str:
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return separator.join(items[:5]) + more

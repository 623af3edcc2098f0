"""Hooks on the model around a student: its normalizer, and the scale of its loss.

``asr.sh`` sets ``normalize: global_mvn`` unless told otherwise, whatever the YAML file
says. In front of an encoder that takes waveforms it standardises the waveform, behind a
frontend it standardises features that are normalised already.

With ``use_amp`` ESPnet's trainer multiplies the loss by 65 536 and more, whatever the
precision. What a regulariser adds to gradients has to be multiplied as well.

Neither the encoder nor the frontend is told of either; their model is, so it is looked
at while it is put together.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from espnet2_spear.zipformer.schedule import BatchCount

_PARTS = ("encoder", "frontend")
REMEDY = "set `normalize: null` (asr.sh: --feats_normalize none)"


def check_normalizer(model: nn.Module, name: str, part: nn.Module | None) -> None:
    """Look at a model that gets another part.

    Args:
        model: whatever module.
        name: of the part.
        part: what the model gets.

    Raises:
        ValueError: a normalizer in front of an encoder that takes waveforms.
    """
    if name not in ("normalize", "encoder", "frontend"):
        return
    parts = {**dict(model.named_children()), name: part}
    normalizer = parts.get("normalize")
    if normalizer is None:
        return
    kind = type(normalizer).__name__
    if getattr(parts.get("encoder"), "takes_waveforms", False):
        raise ValueError(
            f"encoder zipformer: {kind} would change the waveforms that it takes: "
            f"{REMEDY}"
        )
    if getattr(parts.get("frontend"), "is_student", False) and name != "encoder":
        logging.warning(
            f"frontend spear: {kind} changes its features, whose layers are normalised "
            f"already: {REMEDY}"
        )


def watch_loss(model: nn.Module, name: str, part: nn.Module | None) -> None:
    """Have :func:`follow_loss_scale` look at the losses of a model with regularisers.

    Args:
        model: whatever module.
        name: of the part.
        part: what the model gets.
    """
    if name in _PARTS and _count_of(part) is not None:
        model.register_forward_hook(follow_loss_scale)


def follow_loss_scale(model: nn.Module, inputs: tuple, output: Any) -> None:
    """Tell regularisers what the loss is multiplied by; a forward hook of the model.

    The gradient of the loss says it, but not before the backward pass: they follow the
    batch before.
    """
    if isinstance(output, tuple):  # the loss, statistics and a weight
        output = {"loss": output[0]}
    loss = output.get("loss") if isinstance(output, dict) else None
    counts = [_count_of(getattr(model, name, None)) for name in _PARTS]

    def note(grad: Tensor) -> None:
        for count in counts:
            if count is not None:
                count.loss_scale = float(grad)

    if isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1:
        loss.register_hook(note)


def _count_of(part: nn.Module | None) -> BatchCount | None:
    """What the regularisers of a part depend on, None if it has none."""
    return getattr(getattr(part, "schedule", None), "count", None)


@functools.cache  # a process registers the hooks once
def watch_models() -> None:
    """Look at every model that is put together from now on."""
    register_module_module_registration_hook(check_normalizer)
    register_module_module_registration_hook(watch_loss)

"""ESPnet's normalizers of features beside a student, which does not want them.

``asr.sh`` sets ``normalize: global_mvn`` unless told otherwise, whatever the YAML file
says. In front of an encoder that takes waveforms it standardises the waveform, behind a
frontend it standardises features that are normalised already. Neither the encoder nor
the frontend is told of it; their model is, so it is looked at while it is put together.
"""

from __future__ import annotations

import functools
import logging

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

REMEDY = "set `normalize: null` (asr.sh: --feats_normalize null)"


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
    parts = {**model._modules, name: part}
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


@functools.cache  # once
def watch_normalizers() -> None:
    """Have :func:`check_normalizer` look at every model that is built from now on."""
    register_module_module_registration_hook(check_normalizer)

"""A pre-trained student in a recognizer: built, cut, and its schedules at the end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from espnet2_spear.errors import CheckpointError
from espnet2_spear.hub.fetch import is_named
from espnet2_spear.hub.infer import check_fits, differences, say_differences
from espnet2_spear.hub.load import load_model
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import (
    NAMED_CONFIGS,
    ConfigError,
    ZipformerConfig,
)
from espnet2_spear.zipformer.encoder import DownsampledStack


def build_student(
    ckpt: str | None, arch: str | Mapping[str, Any] | None, padding: str | None
) -> tuple[SpearEncoder, bool]:
    """Return the student and whether it holds the weights that it should.

    Args:
        ckpt: local checkpoint or hub id, see ``espnet2_spear.load_model``.
        arch: as of :func:`read_architecture`.
        padding: goes before what the checkpoint or ``arch`` says; None: as they say.

    Raises:
        ValueError: neither of them.
        CheckpointError: an absent checkpoint without ``arch``, an unreadable one, or
            one of another architecture than ``arch``.
    """
    config = None if arch is None else read_architecture(arch)
    if config is not None and padding is not None:
        config = replace(config, padding=padding)
    if ckpt is not None and (is_named(ckpt) or config is None):
        student = load_model(ckpt, padding)
        if config is None:
            student.end_schedules()
            return student, True
        if config.architecture() != student.config.architecture():
            differ = differences(student.config, config)
            told = say_differences(differ, "there", "in arch") or "encoder_unmasked_dim"
            raise CheckpointError(
                f"{ckpt}: its architecture differs from frontend_conf.arch ({told}); "
                f"leave arch out, or let it be {{name: {ckpt}}}"
            )
        other = SpearEncoder(config)
        other.load_state_dict(student.state_dict())
        if not config.regularize_start:
            other.end_schedules()
        return other, True
    if config is None:
        raise ValueError("frontend spear: give `ckpt`, or `arch` without weights")
    if ckpt is not None:
        logging.warning(f"{ckpt} is absent: weights must come with the model's state")
    # Without any checkpoint named, a random student is what was asked for.
    return SpearEncoder(config), ckpt is None


def read_architecture(arch: str | Mapping[str, Any]) -> ZipformerConfig:
    """Return the configuration that ``arch`` of a frontend or encoder asks for.

    Args:
        arch: a named size; or fields of ZipformerConfig, of which ``name`` is a named
            size or a student's checkpoint (all that ``load_model`` opens), whose sizes
            it takes. Such a mapping is written out in place: ESPnet saves it in
            config.yaml, which has to describe the network where the file is gone.

    Raises:
        ConfigError: fields that do not fit together.
        CheckpointError: a checkpoint that cannot be opened.
    """
    name = arch.get("name") if isinstance(arch, Mapping) else arch
    if not isinstance(name, str) or name in NAMED_CONFIGS:
        return ZipformerConfig.build(arch)
    if not is_named(name):
        raise ConfigError(
            f"arch '{name}': neither a named size, one of {sorted(NAMED_CONFIGS)}, nor "
            "the checkpoint of a student"
        )
    if not isinstance(arch, dict):
        raise ConfigError(
            f"arch '{name}': give the checkpoint as arch: {{name: {name}}}, so that "
            "its sizes can be written to config.yaml"
        )
    changes = {key: value for key, value in arch.items() if key != "name"}
    config = load_model(name).config.changed(changes)
    logging.info(f"arch: the sizes of {name}; its weights come by other options")
    arch.clear()
    arch.update(config.to_dict())
    return config


def check_loaded(
    student: SpearEncoder, state: Mapping[str, Any], prefix: str, part: str
) -> None:
    """Refuse weights of another architecture; see :func:`check_fits`.

    Args:
        student: of a frontend or encoder.
        state: of a whole model, about to be loaded.
        prefix: of the student's names in it.
        part: ``frontend`` or ``encoder``.
    """
    option = f"{part}_conf.arch"
    remedy = f"let {option} be {{name: FILE}}, with the FILE of --init_param"
    check_fits(student, state, prefix, option, remedy)


def keep_layers(student: SpearEncoder, layers: int) -> None:
    """Cut a student behind its first layers, in place.

    They give the same hidden states as before; ``encoder_out`` has no meaning any
    more. States with tensors of the removed layers can still be loaded. Parameters
    that no hidden state depends on need no gradient, so that DDP waits for none.

    Args:
        student: is changed.
        layers: how many layers stay, at least 1.
    """
    names = set(student.state_dict())
    stacks = student.encoder.encoders
    left = layers
    for i, stack in enumerate(stacks):
        if left == 0:
            del stacks[i:]
            break
        own = stack.encoder if isinstance(stack, DownsampledStack) else stack
        del own.layers[left:]
        left -= len(own.layers)
    removed = frozenset(names - set(student.state_dict()))
    if removed:
        hook = partial(_forget, removed)
        student.register_load_state_dict_pre_hook(hook)
    # Hidden states are taken before a stack's result is combined with its input.
    if isinstance(stacks[-1], DownsampledStack):
        stacks[-1].out_combiner.requires_grad_(False)
    if student.encoder.downsample_output is not None:
        student.encoder.downsample_output.requires_grad_(False)


def _forget(
    names: frozenset[str],
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    *unused: Any,
) -> None:
    """Take the tensors of removed layers out of a state that is being loaded."""
    for name in names:
        state_dict.pop(prefix + name, None)

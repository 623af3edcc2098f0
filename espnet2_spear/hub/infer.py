"""The shape of a student, found from the names and shapes of its tensors alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from espnet2_spear.errors import CheckpointError
from espnet2_spear.fileio.explain import some
from espnet2_spear.zipformer.config import NAMED_CONFIGS, ConfigError, ZipformerConfig

# What to do about tensors that make no student.
REMEDY = "download the file again, or pass a SPEAR student's checkpoint"
# The only fields that names and shapes of tensors do not determine.
UNSEEN = ("encoder_unmasked_dim",)
HEAD_DIMS = ("query_head_dim", "pos_head_dim", "value_head_dim")
# Beginnings of the names of a student's tensors.
NETWORK = ("encoder_embed.", "encoder.", "mask_emb")
# Options that distinguish variants of a named size.
_VARIANT = ("output_downsampling_factor", "causal", "regularize")


def infer_config(
    state: Mapping[str, Tensor], path: Path, given: Mapping[str, Any] | None = None
) -> ZipformerConfig:
    """Find the configuration of a student.

    Heads of the published widths (4 channels for positions, 12 for values) are
    assumed unless ``given`` says otherwise, as only products are to be seen. The
    unmasked dimension (of the feature masks in training) is that of the named size
    that fits, else everything is unmasked.

    Args:
        state: the student's tensors, without prefix.
        path: their file, for messages.
        given: fields of ZipformerConfig that are known.

    Raises:
        CheckpointError: tensors that no configuration has.
        ConfigError: ``given`` holds what is no field, or no value of it.
    """
    given = ZipformerConfig.fields_from(given or {})
    for key in ("pos_head_dim", "value_head_dim"):
        if given.get(key, 1) < 1:
            raise ConfigError(f"{key} {given[key]}: at least 1")
    seen = _Shapes(state, path)
    conf: dict[str, Any] = {
        "embed_channels": [
            seen.size(f"encoder_embed.conv.{slot}.weight", 0) for slot in (0, 4, 7)
        ],
        "num_mel_bins": _mel_bins(seen),
        "output_downsampling_factor": 1,
    }
    if "encoder.downsample_output.bias" in state:
        factor = seen.size("encoder.downsample_output.bias", 0)
        conf["output_downsampling_factor"] = factor
    stacks = [
        _stack(seen, i, given) for i in range(seen.count(r"encoder\.encoders\.(\d+)\."))
    ]
    if not stacks:
        raise CheckpointError(f"{path}: missing encoder.encoders.*; {REMEDY}")
    conf |= {key: [stack[key] for stack in stacks] for key in stacks[0]}
    for key in ("causal", "pos_dim", *HEAD_DIMS):
        if len(set(conf[key])) != 1:
            raise CheckpointError(
                f"{path}: {key} differs between stacks: {conf[key]}; {REMEDY}"
            )
        conf[key] = conf[key][0]
    conf["encoder_unmasked_dim"] = conf["encoder_dim"]
    try:
        config = ZipformerConfig.from_dict(conf)
        named = named_size(config)
        if named is not None:
            unmasked = NAMED_CONFIGS[named].encoder_unmasked_dim
            conf["encoder_unmasked_dim"] = list(unmasked)
        return ZipformerConfig.from_dict(conf | given)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _mel_bins(seen: _Shapes) -> int:
    """Width of the fbank, by the mask's vector, or else by the embedding.

    The embedding rounds widths down to multiples of 4; of several that fit, a usual
    one is taken.
    """
    if "mask_emb" in seen.state:
        return seen.size("mask_emb", 0)
    channels = seen.size("encoder_embed.conv.7.weight", 0)
    left = seen.size("encoder_embed.out.weight", 1) // channels
    fitting = [4 * left + more for more in (3, 4, 5, 6)]
    return next((bins for bins in (128, 80) if bins in fitting), fitting[1])


def _stack(seen: _Shapes, index: int, given: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"encoder.encoders.{index}."
    factor = 1
    if any(name.startswith(f"{prefix}encoder.") for name in seen.state):
        factor = seen.size(f"{prefix}downsample.bias", 0)
        prefix += "encoder."
    layers = seen.count(re.escape(prefix) + r"layers\.(\d+)\.")
    layer = f"{prefix}layers.0."
    conv = f"{layer}conv_module1.depthwise_conv."
    causal = f"{conv}causal_conv.weight" in seen.state
    kernel = f"{conv}chunkwise_conv.weight" if causal else f"{conv}weight"
    return {
        "downsampling_factor": factor,
        "num_encoder_layers": layers,
        "feedforward_dim": seen.size(f"{layer}feed_forward2.in_proj.weight", 0),
        "encoder_dim": seen.size(f"{layer}norm.bias", 0),
        "cnn_module_kernel": seen.size(kernel, -1),
        "causal": causal,
        "pos_dim": seen.size(f"{layer}self_attn_weights.linear_pos.weight", 1),
        **_heads(seen, layer, index, given),
    }


def _heads(
    seen: _Shapes, layer: str, index: int, given: Mapping[str, Any]
) -> dict[str, int]:
    """Split the widths of attention into heads and what one head has."""
    default = ZipformerConfig()
    pos = seen.size(f"{layer}self_attn_weights.linear_pos.weight", 0)
    queries = seen.size(f"{layer}self_attn_weights.in_proj.weight", 0) - pos
    values = seen.size(f"{layer}self_attn1.in_proj.weight", 0)
    if "num_heads" in given:
        known = given["num_heads"]
        heads = known[index] if index < len(known) else 0
        value_dim = values // heads if heads else 0
    else:
        heads = pos // given.get("pos_head_dim", default.pos_head_dim)
        value_dim = given.get("value_head_dim", default.value_head_dim)
    dims = (pos, queries // 2, values)
    if not heads or any(d % heads for d in dims) or values != heads * value_dim:
        raise CheckpointError(
            f"{seen.path}: {layer}self_attn*: widths {dims} of positions, queries and "
            "values cannot be divided into heads; give num_heads, one per stack"
        )
    return {
        "num_heads": heads,
        "query_head_dim": queries // 2 // heads,
        "pos_head_dim": pos // heads,
        "value_head_dim": value_dim,
    }


def named_size(config: ZipformerConfig) -> str | None:
    """Return the named size that a network is, or a variant of which; None: of none.

    A variant may be causal, and have another output rate.
    """
    for name, known in NAMED_CONFIGS.items():
        differ = differences(config, known)
        if not set(differ) - {*_VARIANT}:
            return name
    return None


def differences(a: ZipformerConfig, b: ZipformerConfig) -> dict[str, tuple]:
    """Fields of the architecture that tensors show and that differ: (a's, b's)."""
    a, b = a.architecture(), b.architecture()
    return {
        f.name: (getattr(a, f.name), getattr(b, f.name))
        for f in fields(a)
        if f.name not in UNSEEN and getattr(a, f.name) != getattr(b, f.name)
    }


def say_differences(differ: Mapping[str, tuple], *where: str) -> str:
    """Say what :func:`differences` found, and where the one and the other value is."""
    told = [
        f"{key} {_plain(a)} {where[0]}, {_plain(b)} {where[1]}"
        for key, (a, b) in differ.items()
    ]
    return some(told, separator="; ")


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _shape(value: Any) -> Any:
    return getattr(value, "shape", None)  # of quantized layers: objects without


def check_fits(
    model: nn.Module, state: Mapping[str, Any], prefix: str, option: str, remedy: str
) -> None:
    """Refuse weights of another architecture in a line, before they are loaded.

    ``load_state_dict`` itself lists tensors, and does not say what to do.

    Args:
        model: the student (SpearEncoder) that they are loaded into.
        state: of a whole model.
        prefix: of the student's names in it.
        option: that set the architecture, for the message.
        remedy: for the message.

    Raises:
        CheckpointError: tensors that the student does not have, or of other shapes.
    """
    own = {k: v for k, v in model.state_dict().items() if k.startswith(NETWORK)}
    names = tuple(prefix + name for name in NETWORK)
    found = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(names)}
    wrong = [k for k, v in found.items() if k not in own or _shape(v) != _shape(own[k])]
    if not wrong:
        return
    told = f"of {len(own)} tensors {len(wrong)} differ, for example {wrong[0]}"
    heads = {key: getattr(model.config, key) for key in HEAD_DIMS}
    try:
        both = [infer_config(x, Path(option), heads) for x in (own, found)]
        told = say_differences(differences(*both), "there", "in the weights") or told
    except CheckpointError:
        pass
    raise CheckpointError(
        f"{option}: another architecture than that of the weights to be loaded "
        f"({told}); {remedy}"
    )


def compact(config: ZipformerConfig) -> dict[str, Any]:
    """Return the shortest mapping that ``ZipformerConfig.from_dict`` makes this of."""
    name = named_size(config)
    start = ZipformerConfig() if name is None else NAMED_CONFIGS[name]
    full, known = config.to_dict(), start.to_dict()
    conf = {key: value for key, value in full.items() if value != known[key]}
    return conf if name is None else {"name": name, **conf}


class _Shapes:
    """Shapes of tensors; asking for one that is absent is a CheckpointError."""

    def __init__(self, state: Mapping[str, Tensor], path: Path) -> None:
        self.state = state
        self.path = path

    def size(self, name: str, axis: int) -> int:
        if name not in self.state:
            raise CheckpointError(f"{self.path}: missing {name}; {REMEDY}")
        shape = tuple(self.state[name].shape)
        if not -len(shape) <= axis < len(shape):
            raise CheckpointError(f"{self.path}: {name} has shape {shape}; {REMEDY}")
        return shape[axis]

    def count(self, pattern: str) -> int:
        """Number of numbered things, whose names start with the pattern."""
        found = [re.match(pattern, name) for name in self.state]
        return 1 + max((int(m.group(1)) for m in found if m), default=-1)

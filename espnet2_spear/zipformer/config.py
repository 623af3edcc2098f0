"""Shape of a SPEAR student: the numbers that its checkpoints are built from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Any

from espnet2_spear.errors import UserError

PADDING_MODES = ("compatible", "exact")
STACK_FIELDS = (
    "downsampling_factor",
    "num_encoder_layers",
    "feedforward_dim",
    "encoder_dim",
    "encoder_unmasked_dim",
    "cnn_module_kernel",
    "num_heads",
)
_DRAWN = ("train_chunk_size", "train_left_context_frames")  # or one number for all
# Options of a run: they change no tensor of a checkpoint.
_RUN_FIELDS = (
    *("chunk_size", "left_context_frames", *_DRAWN, "padding"),
    *("regularize", "regularize_batch_seconds", "regularize_start"),
    "activation_checkpointing",
)
# Options that do nothing unless another one is on. Not chunk_size and
# left_context_frames, which released configurations hold in any case.
_SWITCHES = {
    "train_chunk_size": "causal",
    "train_left_context_frames": "causal",
    "regularize_batch_seconds": "regularize",
    "regularize_start": "regularize",
}
MIN_MEL_BINS = 7  # of which the embedding's two strides in frequency leave one


class ConfigError(UserError):
    """A configuration that cannot be built; the message names the field."""


@dataclass(frozen=True)
class ZipformerConfig:
    """Sizes of the fbank, the convolutional embedding and the Zipformer stacks.

    Fields in ``STACK_FIELDS`` hold one entry per stack; the names are those of the
    released checkpoints' ``config.json``. Fields after ``left_context_frames`` are
    constants there and options here. ``base``, ``large`` and ``xlarge`` train with
    regularisers unless told otherwise, as the published students did; ``mini`` and
    ``tiny``, and released checkpoints opened for fine-tuning, without: schedules that
    last for 50000 batches of 600 s would only hold back a short training.

    Attributes:
        num_mel_bins: width of the log-mel fbank.
        output_downsampling_factor: 1 for 50 Hz outputs, 2 for 25 Hz.
        downsampling_factor: rate of each stack relative to the 50 Hz embedding.
        num_encoder_layers: layers of each stack.
        feedforward_dim: hidden width of the middle feed-forward module; the first
            has 3/4 and the last 5/4 of it.
        encoder_dim: channels of each stack; equal in all stacks.
        encoder_unmasked_dim: channels that the training-time feature mask keeps.
        cnn_module_kernel: odd kernel width of the depthwise convolutions (frames).
        num_heads: attention heads of each stack.
        pos_dim: width of the relative positional encoding; even.
        causal: streaming variant: frames see their own chunk and those before it.
        chunk_size: frames (50 Hz) of a chunk outside training, a multiple of all
            downsampling factors; -1: no chunks, everything is seen.
        left_context_frames: frames (50 Hz) of attention's left context outside
            training, rounded down to whole chunks but at least one; -1: all.
        query_head_dim: width of a query or key head.
        pos_head_dim: width of a positional query head.
        value_head_dim: width of a value head.
        embed_channels: output channels of the embedding's three convolutions.
        train_chunk_size: chunk sizes that causal training draws from, per batch.
        train_left_context_frames: left contexts that it draws from.
        padding: ``compatible`` lets the padding of a batch reach the frames of
            shorter utterances, as the published code does; with ``exact`` an
            utterance's output is what it is for that utterance alone.
        regularize: train with balancers, whitening, dropout, skipping and masks.
        regularize_batch_seconds: audio (seconds, padding included, all ranks) that
            counts as one batch of their schedules.
        regularize_start: batches that count as done at the start (fine-tuning).
        activation_checkpointing: keep only the input of each layer in training and
            compute the rest again in the backward pass: less memory, a third more
            time, the same gradients.
    """

    num_mel_bins: int = 128
    output_downsampling_factor: int = 1
    downsampling_factor: tuple[int, ...] = (1, 2, 4, 8, 4, 2, 1)
    num_encoder_layers: tuple[int, ...] = (1, 2, 3, 3, 1, 1, 1)
    feedforward_dim: tuple[int, ...] = (1536,) * 7
    encoder_dim: tuple[int, ...] = (512,) * 7
    encoder_unmasked_dim: tuple[int, ...] = (256,) * 7
    cnn_module_kernel: tuple[int, ...] = (31, 31, 15, 15, 15, 31, 31)
    num_heads: tuple[int, ...] = (8,) * 7
    pos_dim: int = 48
    causal: bool = False
    chunk_size: int = 8
    left_context_frames: int = 128
    query_head_dim: int = 32
    pos_head_dim: int = 4
    value_head_dim: int = 12
    embed_channels: tuple[int, int, int] = (8, 32, 128)
    train_chunk_size: tuple[int, ...] = (8, 32, 64, -1)
    train_left_context_frames: tuple[int, ...] = (128, 256, -1)
    padding: str = "compatible"
    regularize: bool = False
    regularize_batch_seconds: float = 600.0
    regularize_start: float = 0.0
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in STACK_FIELDS}
        _require(
            len(set(lengths.values())) == 1 and len(self.num_encoder_layers) > 0,
            f"every per-stack list needs one entry per stack, got lengths {lengths}",
        )
        widths, dim = self.embed_channels, self.encoder_dim
        _require(len(widths) == 3, f"embed_channels {widths}: three widths")
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            if isinstance(default, bool):
                _require(isinstance(value, bool), f"{name} {value!r}: true or false")
            elif isinstance(default, (int, tuple)) and name not in _RUN_FIELDS:
                least = min((value,) if isinstance(value, int) else value)
                _require(least >= 1, f"{name} {value}: at least 1")
        bins, unmasked = self.num_mel_bins, self.encoder_unmasked_dim
        kernels, hidden = self.cnn_module_kernel, self.feedforward_dim
        _require(bins >= MIN_MEL_BINS, f"num_mel_bins {bins}: at least {MIN_MEL_BINS}")
        _require(
            len(set(dim)) == 1, f"encoder_dim must be equal in all stacks, got {dim}"
        )
        _require(
            max(unmasked) <= dim[0],
            f"encoder_unmasked_dim {unmasked} exceeds encoder_dim",
        )
        _require(
            all(k % 2 for k in kernels), f"cnn_module_kernel {kernels} must be odd"
        )
        _require(
            not any(f % 4 for f in hidden), f"feedforward_dim {hidden}: multiples of 4"
        )
        _require(dim[0] % 4 == 0, f"encoder_dim {dim[0]}: a multiple of 4")
        _require(
            self.output_downsampling_factor in (1, 2),
            "output_downsampling_factor must be 1 or 2",
        )
        _require(self.pos_dim % 2 == 0, f"pos_dim {self.pos_dim} must be even")
        _require(
            self.padding in PADDING_MODES,
            f"padding '{self.padding}': one of {PADDING_MODES}",
        )
        seconds, start = self.regularize_batch_seconds, self.regularize_start
        _require(
            seconds > 0 and start >= 0,
            f"regularize_batch_seconds {seconds} must be positive, "
            f"regularize_start {start} not negative",
        )
        if self.causal:
            self._check_chunks()

    def _check_chunks(self) -> None:
        self.check_chunk(self.chunk_size, self.left_context_frames)
        drawn = [getattr(self, name) for name in _DRAWN]
        _require(all(drawn), "train_chunk_size, train_left_context_frames: are empty")
        for chunk, left in product(*drawn):
            self.check_chunk(chunk, left)

    def check_chunk(self, chunk_size: int, left_context_frames: int) -> None:
        """Raise ConfigError unless chunks fit the downsampled stacks."""
        unit = math.lcm(*self.downsampling_factor, self.output_downsampling_factor)
        _require(
            chunk_size == -1 or (chunk_size >= 1 and chunk_size % unit == 0),
            f"chunk size {chunk_size}: a multiple of {unit}, or -1",
        )
        _require(
            left_context_frames >= -1,
            f"left context {left_context_frames}: frames, or -1",
        )

    def architecture(self) -> ZipformerConfig:
        """Return the same with the options of a run at their defaults.

        Checkpoints fit a network if these are equal.
        """
        return replace(self, **{name: _DEFAULTS[name] for name in _RUN_FIELDS})

    @property
    def frame_rate(self) -> float:
        """Output frames per second."""
        return 50.0 / self.output_downsampling_factor

    @classmethod
    def from_name(cls, name: str) -> ZipformerConfig:
        """Return a named size.

        Args:
            name: one of ``NAMED_CONFIGS`` (``base``, ``large``, ``xlarge`` are the
                published ones, ``mini`` and ``tiny`` are for two CPU cores and tests).

        Raises:
            ConfigError: unknown name; the message lists the known ones.
        """
        if not isinstance(name, str) or name not in NAMED_CONFIGS:
            raise ConfigError(f"unknown size {name!r}, one of {sorted(NAMED_CONFIGS)}")
        return NAMED_CONFIGS[name]

    @classmethod
    def from_dict(cls, conf: Mapping[str, Any]) -> ZipformerConfig:
        """Build from a mapping: ESPnet's YAML or a released ``config.json``.

        Per-stack values may be lists or comma-separated strings. ``name`` chooses a
        named size that the other keys change.

        Raises:
            ConfigError: no mapping, a key that is no field, values that do not fit
                together, or an option that does nothing.
        """
        if not isinstance(conf, Mapping):
            raise ConfigError(f"expected a table of fields, got {conf!r}")
        conf = dict(conf)
        start = cls.from_name(conf.pop("name")) if "name" in conf else cls()
        return start.changed(conf)

    def changed(self, conf: Mapping[str, Any]) -> ZipformerConfig:
        """Return the same with other values, as YAML or JSON holds them.

        Options without effect under the new values are reset to their defaults, so
        that to_dict and from_dict round-trip.

        Raises:
            ConfigError: as of :meth:`from_dict`.
        """
        given = self.fields_from(conf)
        config = replace(self, **given)
        idle = {k: s for k, s in _SWITCHES.items() if not getattr(config, s)}
        for key, switch in idle.items():
            if given.get(key, _DEFAULTS[key]) != _DEFAULTS[key]:
                raise ConfigError(
                    f"{key} does nothing without {switch}: set {switch}: true, or "
                    f"leave {key} out"
                )
        return replace(config, **{key: _DEFAULTS[key] for key in idle})

    @classmethod
    def fields_from(cls, conf: Mapping[str, Any]) -> dict[str, Any]:
        """Turn what YAML or JSON holds into fields' values, for ``replace``.

        Raises:
            ConfigError: an unknown key, or a value of another type.
        """
        unknown = sorted(str(key) for key in conf if key not in _DEFAULTS)
        if unknown:
            raise ConfigError(f"unknown keys {unknown}; known: {sorted(_DEFAULTS)}")
        return {key: _plain(key, conf[key]) for key in conf}

    @classmethod
    def build(cls, arch: str | Mapping[str, Any] | ZipformerConfig) -> ZipformerConfig:
        """Build from whatever a YAML ``arch`` may hold: a name or a mapping."""
        if isinstance(arch, ZipformerConfig):
            return arch
        return cls.from_name(arch) if isinstance(arch, str) else cls.from_dict(arch)

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python lists and numbers, fit for YAML and checkpoints."""
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()
        }


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


_DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(ZipformerConfig)}


def _plain(key: str, value: Any) -> Any:
    """Turn what YAML or JSON may hold into the type of a field's default."""
    default = _DEFAULTS[key]
    listed = isinstance(default, tuple)
    try:
        if listed:
            parts = value.split(",") if isinstance(value, str) else value
            if key in _DRAWN and isinstance(value, int):
                parts = [value]
            return tuple(_whole(p) for p in parts)
        if isinstance(default, bool):
            return bool(value) if value in (0, 1) else value
        if isinstance(default, int):
            return _whole(value)
        if isinstance(default, float):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        kind = "numbers, as 1,2,3" if listed else "a number"
        raise ConfigError(f"{key}: expected {kind}; got {value!r}") from None
    return value


def _whole(value: Any) -> int:
    number = int(value)
    if isinstance(value, bool) or (isinstance(value, float) and value != number):
        raise ValueError
    return number


def _uniform(
    layers: tuple[int, ...], dim: int, ff: int, unmasked: int
) -> ZipformerConfig:
    n = len(layers)
    return ZipformerConfig(
        num_encoder_layers=layers,
        encoder_dim=(dim,) * n,
        feedforward_dim=(ff,) * n,
        encoder_unmasked_dim=(unmasked,) * n,
        regularize=True,
    )


NAMED_CONFIGS: dict[str, ZipformerConfig] = {
    "base": _uniform((1, 2, 3, 3, 1, 1, 1), 512, 1536, 256),
    "large": _uniform((1, 2, 2, 3, 1, 1, 1), 1024, 3072, 512),
    "xlarge": _uniform((1, 2, 3, 4, 1, 1, 1), 1280, 3840, 768),
    "mini": ZipformerConfig(
        downsampling_factor=(2, 4, 2),
        num_encoder_layers=(1, 2, 1),
        feedforward_dim=(512,) * 3,
        encoder_dim=(256,) * 3,
        encoder_unmasked_dim=(192,) * 3,
        cnn_module_kernel=(31,) * 3,
        num_heads=(4,) * 3,
        embed_channels=(4, 8, 16),
    ),
    "tiny": ZipformerConfig(
        downsampling_factor=(1, 2, 1),
        num_encoder_layers=(1, 1, 1),
        feedforward_dim=(64,) * 3,
        encoder_dim=(32,) * 3,
        encoder_unmasked_dim=(24,) * 3,
        cnn_module_kernel=(15,) * 3,
        num_heads=(2,) * 3,
        query_head_dim=8,
        embed_channels=(2, 4, 8),
    ),
}

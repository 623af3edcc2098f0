"""Shape of a SPEAR student: the numbers that its checkpoints are built from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

STACK_FIELDS = (
    "downsampling_factor",
    "num_encoder_layers",
    "feedforward_dim",
    "encoder_dim",
    "encoder_unmasked_dim",
    "cnn_module_kernel",
    "num_heads",
)


@dataclass(frozen=True)
class ZipformerConfig:
    """Sizes of the fbank, the convolutional embedding and the Zipformer stacks.

    Fields in ``STACK_FIELDS`` hold one entry per stack; the names are those of the
    released checkpoints' ``config.json``. Fields after ``left_context_frames`` are
    constants there and options here.

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
        causal: streaming variant (checkpoints of it are refused for now).
        chunk_size: frames (50 Hz) of a streaming chunk.
        left_context_frames: frames (50 Hz) of left context when streaming.
        query_head_dim: width of a query or key head.
        pos_head_dim: width of a positional query head.
        value_head_dim: width of a value head.
        embed_channels: output channels of the embedding's three convolutions.
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

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in STACK_FIELDS}
        if len(set(lengths.values())) != 1:
            raise ValueError(
                f"every per-stack list needs one entry per stack, got lengths {lengths}"
            )
        if len(set(self.encoder_dim)) != 1:
            raise ValueError(
                f"encoder_dim must be equal in all stacks, got {self.encoder_dim}"
            )
        if any(d < 1 for d in self.downsampling_factor):
            raise ValueError(f"downsampling_factor {self.downsampling_factor} < 1")
        if any(k % 2 == 0 for k in self.cnn_module_kernel):
            raise ValueError(f"cnn_module_kernel {self.cnn_module_kernel} must be odd")
        if any((3 * f) % 4 or (5 * f) % 4 for f in self.feedforward_dim):
            raise ValueError(f"feedforward_dim {self.feedforward_dim}: multiples of 4")
        if self.encoder_dim[0] % 4:
            raise ValueError(f"encoder_dim {self.encoder_dim[0]}: a multiple of 4")
        if self.output_downsampling_factor not in (1, 2):
            raise ValueError("output_downsampling_factor must be 1 or 2")
        if self.pos_dim % 2:
            raise ValueError(f"pos_dim {self.pos_dim} must be even")
        if len(self.embed_channels) != 3:
            raise ValueError(f"embed_channels {self.embed_channels}: three widths")
        if self.causal:
            raise ValueError(
                "causal (streaming) checkpoints are not supported yet; "
                "use a checkpoint with causal: false"
            )

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
            ValueError: unknown name; the message lists the known ones.
        """
        if name not in NAMED_CONFIGS:
            raise ValueError(f"unknown size '{name}', one of {sorted(NAMED_CONFIGS)}")
        return NAMED_CONFIGS[name]

    @classmethod
    def from_dict(cls, conf: Mapping[str, Any]) -> ZipformerConfig:
        """Build from a mapping: ESPnet's YAML or a released ``config.json``.

        Per-stack values may be lists or comma-separated strings. ``name`` chooses a
        named size that the other keys change.

        Raises:
            ValueError: a key that is no field, or values that do not fit together.
        """
        conf = dict(conf)
        start = cls.from_name(conf.pop("name")) if "name" in conf else cls()
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(conf) - known)
        if unknown:
            raise ValueError(f"unknown keys {unknown}; known: {sorted(known)}")
        return replace(start, **{key: _plain(key, conf[key]) for key in conf})

    @classmethod
    def build(cls, arch: str | Mapping[str, Any] | ZipformerConfig) -> ZipformerConfig:
        """Build from whatever a YAML ``arch`` may hold: a name or a mapping."""
        if isinstance(arch, cls):
            return arch
        return cls.from_name(arch) if isinstance(arch, str) else cls.from_dict(arch)

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python lists and numbers, fit for YAML and checkpoints."""
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()
        }


def _plain(key: str, value: Any) -> Any:
    """Turn a list or a comma-separated string into a tuple of ints."""
    if key in STACK_FIELDS or key == "embed_channels":
        parts = value.split(",") if isinstance(value, str) else value
        try:
            return tuple(int(p) for p in parts)
        except (TypeError, ValueError):
            raise ValueError(f"{key}: expected whole numbers, got {value!r}") from None
    return value


def _uniform(
    layers: tuple[int, ...], dim: int, ff: int, unmasked: int
) -> ZipformerConfig:
    n = len(layers)
    return ZipformerConfig(
        num_encoder_layers=layers,
        encoder_dim=(dim,) * n,
        feedforward_dim=(ff,) * n,
        encoder_unmasked_dim=(unmasked,) * n,
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

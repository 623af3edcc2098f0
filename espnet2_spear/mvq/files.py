"""Quantizer files: ours of every kind, and the multi-quantization library's."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from espnet2_spear.fileio.atomic import write_atomically
from espnet2_spear.mvq.baselines import (
    KMeansQuantizer,
    RandomProjectionQuantizer,
    ResidualQuantizer,
)
from espnet2_spear.mvq.quantizer import FORMAT, AbsQuantizer, Quantizer, QuantizerError

KINDS: dict[str, type[AbsQuantizer]] = {
    cls.kind: cls
    for cls in (
        Quantizer,
        KMeansQuantizer,
        ResidualQuantizer,
        RandomProjectionQuantizer,
    )
}
REMEDY = "copy or train it again"
# State dict of the multi-quantization library; N, K, D as in our classes.
LIBRARY_KEYS = (
    "to_logits.weight",  # float32 (N*K, D)
    "to_logits.bias",  # float32 (N*K,)
    "centers",  # float32 (N, K, D)
    "logits_scale",  # float32 ()
    "centers_scale",  # float32 ()
    "id_buf",  # uint8 (8,)
)


def load_quantizer(path: str | os.PathLike[str]) -> AbsQuantizer:
    """Open a file, in eval mode on the CPU; no code from the file is executed.

    It may be one of ours, a state dict of the multi-quantization library, or what the
    SPEAR authors keep: {"quantizer": such a state dict, "mean": (D,), "std": (D,)}.

    Raises:
        QuantizerError: missing, corrupt or foreign file, or values that no quantizer
            has.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise QuantizerError(
            f"{path}: no such quantizer; train it with espnet2_spear.bin.mvq_train "
            "(recipe stage 4)"
        ) from None
    except Exception as error:  # whatever the unpickler meets
        raise QuantizerError(
            f"{path}: not a readable quantizer file ({type(error).__name__}); {REMEDY}"
        ) from error
    kind, state, metadata = _parts(path, content)
    try:
        quantizer = KINDS[kind].from_state(state)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # torch's is long
        raise QuantizerError(
            f"{path}: its tensors do not make a quantizer of kind '{kind}' ({reason}); "
            f"{REMEDY}"
        ) from error
    _check_values(path, quantizer)
    quantizer.metadata = metadata
    return quantizer.eval()


def _check_values(path: str | os.PathLike[str], quantizer: AbsQuantizer) -> None:
    """Raise QuantizerError for values that would give wrong codes, or none."""
    for key, value in quantizer.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise QuantizerError(f"{path}: '{key}' holds NaN or infinity; {REMEDY}")
    if bool((quantizer.std <= 0).any()):
        raise QuantizerError(
            f"{path}: 'std' holds {float(quantizer.std.min()):g}; standard deviations "
            f"must be above 0; {REMEDY}"
        )
    identity = bytes(quantizer.id_buf.tolist())
    if not (identity.isascii() and identity.decode("ascii").isprintable()):
        raise QuantizerError(
            f"{path}: 'id_buf' holds {identity!r}, no name of a quantizer; {REMEDY}"
        )


def _parts(
    path: str | os.PathLike[str], content: Any
) -> tuple[str, Mapping[str, Tensor], dict[str, Any]]:
    """Kind, state dict and metadata of whatever form the file has."""
    kind, metadata = Quantizer.kind, {}
    if isinstance(content, dict) and content.get("format") == FORMAT:
        kind = content.get("kind", kind)
        metadata, content = content.get("metadata", {}), content.get("state_dict")
    elif isinstance(content, dict) and isinstance(content.get("quantizer"), dict):
        extra = {key: content.get(key) for key in ("mean", "std")}
        content = {**content["quantizer"], **_statistics(path, extra)}
    if kind not in tuple(KINDS):  # it need not be hashable
        raise QuantizerError(
            f"{path}: is a quantizer of kind '{kind}', this version knows "
            f"{', '.join(KINDS)}"
        )
    if not isinstance(content, dict) or (
        kind == Quantizer.kind and not set(LIBRARY_KEYS) <= content.keys()
    ):
        raise QuantizerError(
            f"{path}: neither a quantizer of this package nor one of the "
            f"multi-quantization library, whose state dict has {LIBRARY_KEYS}"
        )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise QuantizerError(
                f"{path}: {key!r} of its state dict is a {type(value).__name__}, not a "
                f"tensor; {REMEDY}"
            )
    if not isinstance(metadata, dict) or not all(
        isinstance(metadata.get(key), dict | None) for key in ("teacher", "training")
    ):
        raise QuantizerError(
            f"{path}: its metadata, or 'teacher' or 'training' in it, are no dict; "
            f"{REMEDY}"
        )
    return kind, content, metadata


def _statistics(path, values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Mean and standard deviation stored beside the library's state dict, (D,)."""
    result = {}
    for key, value in values.items():
        try:
            result[key] = torch.as_tensor(value, dtype=torch.float32).flatten()
        except (TypeError, ValueError, RuntimeError) as error:
            raise QuantizerError(
                f"{path}: '{key}' beside the quantizer is no vector ({error})"
            ) from error
    return result


def export_library(
    quantizer: AbsQuantizer, path: str | os.PathLike[str], with_statistics: bool
) -> None:
    """Write a file that the multi-quantization library can load.

    Args:
        quantizer: of kind mvq.
        path: of the file; its folder is made if it is not there.
        with_statistics: write {"quantizer": state dict, "mean", "std"} as the SPEAR
            authors do; otherwise the bare state dict, whose user gives the library
            vectors that are standardised already.

    Raises:
        QuantizerError: another kind, or a standardisation that the bare form would
            lose.
        OSError: it cannot be written, such as on a full disk.
    """
    if not isinstance(quantizer, Quantizer):
        raise QuantizerError(
            f"a quantizer of kind '{quantizer.kind}' has no form in the "
            "multi-quantization library"
        )
    mean, std = quantizer.mean.cpu(), quantizer.std.cpu()
    if not with_statistics and bool((mean != 0).any() or (std != 1).any()):
        raise QuantizerError(
            "this quantizer standardises its input, which the library's own form "
            "cannot say: export it with its mean and standard deviation, or train it "
            "with --standardize false"
        )
    tensors = quantizer.state_dict()
    state: dict[str, Any] = {
        key: tensors[key].detach().cpu().clone() for key in LIBRARY_KEYS
    }
    if with_statistics:
        state = {"quantizer": state, "mean": mean, "std": std}
    # In memory first: torch turns errors of a file into RuntimeErrors.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(Path(path), buffer.getvalue())

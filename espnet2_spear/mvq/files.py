"""Quantizer files: ours of every kind, and the multi-quantization library's."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from espnet2_spear.fileio.atomic import save_whole
from espnet2_spear.mvq.baselines import (
    KMeansQuantizer,
    RandomProjectionQuantizer,
    ResidualQuantizer,
)
from espnet2_spear.mvq.quantizer import (
    FORMAT,
    AbsQuantizer,
    Quantizer,
    QuantizerError,
)

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
    kind, state, metadata = _parts(content)
    if kind not in tuple(KINDS):  # it need not be hashable
        raise QuantizerError(
            f"{path}: is a quantizer of kind '{kind}', this version knows "
            f"{', '.join(KINDS)}"
        )
    if not isinstance(state, dict) or "centers" not in state:
        raise QuantizerError(
            f"{path}: neither a quantizer of this package nor one of the "
            f"multi-quantization library, whose state dict has {LIBRARY_KEYS}"
        )
    if not isinstance(metadata, dict) or not all(
        isinstance(metadata.get(key), dict | None) for key in ("teacher", "training")
    ):
        raise QuantizerError(
            f"{path}: its metadata, or 'teacher' or 'training' in it, are no dict; "
            f"{REMEDY}"
        )
    try:
        quantizer = KINDS[kind].from_state(state)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # torch's is long
        raise QuantizerError(
            f"{path}: its tensors do not make a quantizer of kind '{kind}' ({reason}); "
            f"{REMEDY}"
        ) from error
    _check_values(path, quantizer)
    quantizer.metadata = metadata
    return quantizer.eval()


def _parts(content: Any) -> tuple[Any, Any, Any]:
    """Kind, state dict and metadata of whatever form the file has, unchecked."""
    if not isinstance(content, dict):
        return Quantizer.kind, None, {}
    if content.get("format") == FORMAT:
        kind = content.get("kind", Quantizer.kind)
        return kind, content.get("state_dict"), content.get("metadata", {})
    state = content
    if isinstance(content.get("quantizer"), dict):
        beside = {key: content.get(key) for key in ("mean", "std")}
        vectors = {k: v.flatten() for k, v in beside.items() if isinstance(v, Tensor)}
        state = {**content["quantizer"], **beside, **vectors}
    return Quantizer.kind, state, {}


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
    save_whole(state, path)

"""Teachers from S3PRL: one hidden state of an upstream."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.teachers.base import (
    Teacher,
    TeacherError,
    without_padding,
)
from espnet2_spear.teachers.weights import check_sha256, find_weights, tensors_only

_MIN_SECONDS = 0.05  # shorter audio is padded by S3PRL itself
_ENTRY = re.compile(r"^def (\w+)_(local|custom)\(", re.MULTILINE)


class S3PRLTeacher(Teacher):
    """One hidden state of an S3PRL upstream, from a local checkpoint.

    Only utterances of one length are taken together, since not all upstreams mask
    padding.

    Args:
        upstream: name without ``_local`` or ``_custom``: wavlm, hubert, wav2vec2,
            data2vec, distiller, ...; an unknown one gives an error with the list.
        weights: checkpoint in S3PRL's form. It is read without executing anything;
            nothing is downloaded.
        layer: index into the upstream's ``hidden_states``; -1 for the last.
        sha256: expected hash of the file, if it is to be checked.
    """

    def __init__(
        self,
        upstream: str,
        weights: str,
        layer: int = -1,
        sha256: str | None = None,
    ) -> None:
        super().__init__()
        entry = _find_entry(upstream)
        path = find_weights(weights)
        self.weights_sha256 = check_sha256(path, sha256)
        try:
            with tensors_only():
                model = entry(str(path))
        except Exception as error:  # upstreams raise all sorts of things
            raise TeacherError(
                f"{path}: cannot be opened as S3PRL upstream {upstream} ({error}); "
                "fairseq's own checkpoints must be converted with "
                "s3prl.upstream.<name>.convert first"
            ) from error
        self.model = model.eval()
        self.min_samples = round(_MIN_SECONDS * SAMPLE_RATE)
        with torch.no_grad():
            states = self.model([torch.zeros(SAMPLE_RATE)])["hidden_states"]
        if not -1 <= layer < len(states):
            raise TeacherError(
                f"{path}: layer must be from -1 to {len(states) - 1}, not {layer}"
            )
        self.layer = layer
        self.dim = states[layer].size(-1)
        hop = model.get_downsample_rates("hidden_states")
        self.hop = hop[layer] if isinstance(hop, (list, tuple)) else hop
        self.frame_rate = SAMPLE_RATE / self.hop

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Return the largest number of frames; upstreams may give one or two less."""
        return (lengths + self.hop - 1) // self.hop

    def embed(self, speech: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Embed a batch; see :class:`Teacher`."""
        return without_padding(self._hidden_state, speech, lengths)

    def _hidden_state(self, speech: Tensor) -> Tensor:
        return self.model(list(speech))["hidden_states"][self.layer].float()


def _find_entry(upstream: str) -> Callable[..., torch.nn.Module]:
    """Find the function of S3PRL that opens an upstream's checkpoint.

    Only the upstream's own module is imported: importing S3PRL's hub would import all.
    """
    spec = importlib.util.find_spec("s3prl")
    if spec is None or not spec.submodule_search_locations:
        raise TeacherError(
            "teacher s3prl needs the package s3prl: pip install espnet-s3prl (or s3prl)"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "upstream"
    entries: dict[str, tuple[str, str]] = {}
    for path in sorted(folder.glob("*/hubconf.py")):
        for name, kind in _ENTRY.findall(path.read_text(encoding="utf-8")):
            if not name.startswith("_"):
                entries.setdefault(name, (path.parent.name, f"{name}_{kind}"))
    if upstream not in entries:
        raise TeacherError(
            f"unknown S3PRL upstream {upstream!r}; choose one of: {', '.join(entries)}"
        )
    module, function = entries[upstream]
    try:
        hubconf = importlib.import_module(f"s3prl.upstream.{module}.hubconf")
    except ImportError as error:
        raise TeacherError(
            f"S3PRL upstream {upstream} needs a package that is not installed: {error}"
        ) from error
    return getattr(hubconf, function)

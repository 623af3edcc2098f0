"""SPEAR student as an ESPnet frontend."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import humanfriendly
import torch
import torch.nn.functional as F
from espnet2.asr.frontend.abs_frontend import AbsFrontend
from torch import Tensor, nn

from espnet2_spear.hub.load import CheckpointError, load_model
from espnet2_spear.spear.encoder import SpearEncoder
from espnet2_spear.zipformer.config import ZipformerConfig
from espnet2_spear.zipformer.fbank import SAMPLE_RATE


class Featurizer(nn.Module):
    """One layer, or a learned weighted sum of all layers.

    Args:
        num_layers: hidden states there are.
        layer: index of the only layer to use (negative: from the last), or None for
            the weighted sum, whose weights start equal.
        layer_norm: normalise every layer (without learned parameters) first; layers
            differ much in scale.
    """

    def __init__(self, num_layers: int, layer: int | None, layer_norm: bool) -> None:
        super().__init__()
        if layer is not None and not -num_layers <= layer < num_layers:
            raise ValueError(f"layer {layer}: the model has {num_layers} layers")
        self.layer = layer
        self.layer_norm = layer_norm
        if layer is None:
            self.weights = nn.Parameter(torch.zeros(num_layers))

    def forward(self, hidden_states: list[Tensor]) -> Tensor:
        """Map a list of (B, T, C) to (B, T, C)."""
        if self.layer is not None:
            return self._norm(hidden_states[self.layer])
        weights = self.weights.softmax(dim=0)
        out = weights[0] * self._norm(hidden_states[0])
        for weight, hidden in zip(weights[1:], hidden_states[1:], strict=True):
            out = out + weight * self._norm(hidden)
        return out

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) if self.layer_norm else x


class SpearFrontend(AbsFrontend):
    """Features from a SPEAR student, 50 frames per second unless stacked.

    The features of an utterance can depend slightly on the padding of its batch,
    as in the published code, unless ``padding`` is ``exact``. Use ``normalize: null``
    in the configuration: the usual utterance normalisation would change the features
    in place.

    Args:
        fs: sampling rate of the data, a number or a string such as ``16k``; only
            16 kHz is accepted.
        ckpt: local checkpoint, see ``espnet2_spear.load_model``. Where the file is
            gone (a packed model elsewhere), the network is built from ``arch`` and
            its weights must come with the model's own state.
        arch: named size or fields of ZipformerConfig; needed without ``ckpt``. Next to
            ``ckpt`` it must describe the same network; its options of a run
            (``regularize``, ``chunk_size``, ...) go before those of the checkpoint.
        layer: index of a single layer, or None for a learned weighted sum.
        layer_norm: normalise every layer before the sum.
        stack: consecutive frames made one, of as many times the channels; what is
            left over at the end is dropped. 2 gives 25 frames per second.
        freeze: keep the student fixed and in eval mode; no gradient is computed. A
            student that is trained on keeps the regularisers of its configuration,
            with their schedules at the end unless ``arch`` says otherwise.
        padding: ``exact`` or ``compatible``, see ZipformerConfig; None: as configured.

    Raises:
        ValueError: another sampling rate, a layer that does not exist, or stack < 1.
        CheckpointError: a checkpoint that is absent (without ``arch``), unreadable or
            of another architecture than ``arch``.
    """

    def __init__(
        self,
        fs: int | str = SAMPLE_RATE,
        ckpt: str | None = None,
        arch: str | Mapping[str, Any] | None = None,
        layer: int | None = None,
        layer_norm: bool = True,
        stack: int = 1,
        freeze: bool = True,
        padding: str | None = None,
    ) -> None:
        super().__init__()
        fs = humanfriendly.parse_size(fs) if isinstance(fs, str) else fs
        if fs != SAMPLE_RATE:
            raise ValueError(
                f"frontend spear works on {SAMPLE_RATE} Hz audio, not {fs} Hz: "
                "format the data with fs 16k (asr.sh --fs 16k)"
            )
        if stack < 1:
            raise ValueError(f"frontend spear: stack is {stack}; at least 1")
        # Denormal numbers in attention weights would slow a CPU down.
        torch.set_flush_denormal(True)
        self.ckpt = ckpt
        self.freeze = freeze
        self.stack = stack
        self.hop_length = 320 * stack
        self.frontend_type = "spear"
        self.upstream, self._has_weights = _build_upstream(ckpt, arch, padding)
        # Nothing below masks the fbank: without this DDP would wait for a gradient.
        self.upstream.mask_emb.requires_grad_(False)
        if freeze:
            self.upstream.requires_grad_(False)
        else:
            self.schedule = self.upstream.batch_count_state()
        self.featurizer = Featurizer(self.upstream.num_layers, layer, layer_norm)
        self.upstream.register_load_state_dict_pre_hook(self._note_loading)
        self.train(self.training)

    def _note_loading(self, module, state_dict, prefix, *unused) -> None:
        """Remember that weights came; a state equal to ours carried nothing new."""
        value = state_dict.get(prefix + "mask_emb")
        if value is not None and not torch.equal(
            value.cpu(), module.mask_emb.detach().cpu()
        ):
            self._has_weights = True

    def reload_pretrained_parameters(self) -> None:
        """Load the checkpoint again, after ESPnet's ``init:`` overwrote it."""
        if self.ckpt is not None and Path(self.ckpt).exists():
            self.upstream.load_state_dict(load_model(self.ckpt).state_dict())

    def train(self, mode: bool = True) -> SpearFrontend:
        """Switch modes; a frozen student stays in eval mode."""
        super().train(mode)
        if self.freeze:
            self.upstream.eval()
        return self

    def output_size(self) -> int:
        """Channels of the features."""
        return self.upstream.output_size() * self.stack

    def output_lengths(self, samples: Tensor | int) -> Tensor | int:
        """Exact number of frames for so many samples (16 kHz)."""
        return self.upstream.hidden_lengths(samples) // self.stack

    def forward(self, input: Tensor, input_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features.

        Args:
            input: (B, samples) float in [-1, 1], 16 kHz.
            input_lengths: (B,) samples.

        Returns:
            features (B, T, C) and their lengths (B,).

        Raises:
            CheckpointError: no weights were ever loaded.
            ValueError: an utterance too short for one frame.
        """
        if not self._has_weights:
            raise CheckpointError(
                f"frontend spear: the checkpoint {self.ckpt} does not exist and no "
                "weights were loaded in its place; correct frontend_conf.ckpt"
            )
        with torch.no_grad() if self.freeze else nullcontext():
            out = self.upstream(input, input_lengths)
        features, lengths = self.featurizer(out.hidden_states), out.hidden_states_lens
        if self.stack == 1:
            return features, lengths
        if int(lengths.min()) < self.stack:
            raise ValueError(
                f"frontend spear: an utterance of {int(lengths.min())} frames is "
                f"shorter than stack={self.stack}"
            )
        whole = features[:, : features.shape[1] // self.stack * self.stack]
        stacked = whole.unflatten(1, (-1, self.stack)).flatten(2)
        return stacked, lengths // self.stack


def _build_upstream(
    ckpt: str | None, arch: str | Mapping[str, Any] | None, padding: str | None
) -> tuple[SpearEncoder, bool]:
    """Return the student and whether it holds weights from a file."""
    config = None if arch is None else ZipformerConfig.build(arch)
    if config is not None and padding is not None:
        config = replace(config, padding=padding)
    if ckpt is not None and (Path(ckpt).exists() or config is None):
        upstream = load_model(ckpt, padding)
        if config is None:
            upstream.end_schedules()
            return upstream, True
        if config.architecture() != upstream.config.architecture():
            raise CheckpointError(f"{ckpt}: its architecture differs from `arch`")
        student = SpearEncoder(config)
        student.load_state_dict(upstream.state_dict())
        return student, True
    if config is None:
        raise ValueError("frontend spear: give `ckpt`, or `arch` without weights")
    if ckpt is not None:
        logging.warning(f"{ckpt} is absent: weights must come with the model's state")
    # Without any checkpoint named, a random student is what was asked for.
    return SpearEncoder(config), ckpt is None

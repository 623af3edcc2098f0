"""Zipformer as an ESPnet encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from espnet2.asr.encoder.abs_encoder import AbsEncoder
from torch import Tensor

from espnet2_spear.spear.encoder import SpearEncoder
from espnet2_spear.zipformer.config import ZipformerConfig


class ZipformerEncoder(SpearEncoder, AbsEncoder):
    """The student under ESPnet's encoder interface, for training and fine-tuning.

    Parameters have the names that they have in the student, so that a pre-trained
    one is loaded by ``--init_param exp/spear/valid.loss.best.pth:student:encoder``.

    Args:
        input_size: 1 for raw waveforms (``frontend: null``, ``input_size: 1``), else
            the width of the frontend's features, at 100 Hz, which must be the
            network's ``num_mel_bins``.
        arch: named size or fields of ZipformerConfig; ``regularize`` and
            ``regularize_start`` among them say what shapes training.
        padding: ``exact`` or ``compatible``, see ZipformerConfig; None: as in ``arch``.

    Raises:
        ValueError: an input size that does not fit the network.
    """

    def __init__(
        self,
        input_size: int,
        arch: str | Mapping[str, Any] = "base",
        padding: str | None = None,
    ) -> None:
        config = ZipformerConfig.build(arch)
        if padding is not None:
            config = replace(config, padding=padding)
        if input_size not in (1, config.num_mel_bins):
            raise ValueError(
                f"encoder zipformer: input_size {input_size}; use 1 (raw waveform, "
                f"frontend: null) or features of {config.num_mel_bins} bins"
            )
        super().__init__(config)
        self.from_waveform = input_size == 1
        # Nothing here masks the fbank: without this DDP would wait for a gradient.
        self.mask_emb.requires_grad_(False)
        self.schedule = self.batch_count_state()

    def forward(
        self,
        xs_pad: Tensor,
        ilens: Tensor,
        prev_states: Tensor | None = None,
        return_all_hs: bool = False,
    ) -> tuple[Tensor | tuple[Tensor, list[Tensor]], Tensor, None]:
        """Encode.

        Args:
            xs_pad: (B, samples) or (B, samples, 1) waveforms, 16 kHz, in [-1, 1]; or
                (B, T, num_mel_bins) features.
            ilens: (B,) samples or frames.
            prev_states: unused, part of ESPnet's interface.
            return_all_hs: also return the hidden states.

        Returns:
            encoder_out (B, T', C) or (encoder_out, hidden states), its lengths (B,),
            and None.
        """
        if self.from_waveform:
            speech = xs_pad.squeeze(-1) if xs_pad.dim() == 3 else xs_pad
            out = SpearEncoder.forward(self, speech, ilens)
        else:
            out = self.encode(xs_pad, ilens)
        if return_all_hs:
            return (out.encoder_out, out.hidden_states), out.encoder_out_lens, None
        return out.encoder_out, out.encoder_out_lens, None

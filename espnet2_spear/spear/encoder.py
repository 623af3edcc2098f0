"""The SPEAR student from waveform to frames, as released checkpoints hold it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from espnet2_spear.zipformer.config import ZipformerConfig
from espnet2_spear.zipformer.embed import ConvEmbed
from espnet2_spear.zipformer.encoder import Zipformer
from espnet2_spear.zipformer.fbank import FRAME_SHIFT, Fbank, num_frames


@dataclass
class SpearOutput:
    """What the student says of a batch.

    Attributes:
        encoder_out: (B, T', C), at ``config.frame_rate``.
        encoder_out_lens: (B,) frames.
        hidden_states: one (B, T, C) per layer, always at 50 Hz. The last one equals
            ``encoder_out`` unless the output is downsampled.
        hidden_states_lens: (B,) frames at 50 Hz.
    """

    encoder_out: Tensor
    encoder_out_lens: Tensor
    hidden_states: list[Tensor]
    hidden_states_lens: Tensor


class SpearEncoder(nn.Module):
    """Fbank, convolutional embedding and Zipformer.

    Sub-modules are named as in the released checkpoints (``encoder_embed``,
    ``encoder``, ``mask_emb``).

    Args:
        config: sizes of the network.
    """

    def __init__(self, config: ZipformerConfig) -> None:
        super().__init__()
        self.config = config
        self.fbank = Fbank(config.num_mel_bins)
        self.encoder_embed = ConvEmbed(
            config.num_mel_bins, config.encoder_dim[0], config.embed_channels
        )
        self.encoder = Zipformer(config)
        self.mask_emb = nn.Parameter(torch.randn(config.num_mel_bins))

    def output_size(self) -> int:
        """Channels of every output."""
        return self.config.encoder_dim[-1]

    @property
    def num_layers(self) -> int:
        """Number of hidden states."""
        return sum(self.config.num_encoder_layers)

    @property
    def min_samples(self) -> int:
        """Fewest samples (16 kHz) that give one output frame."""
        return 9 * FRAME_SHIFT - FRAME_SHIFT // 2

    def hidden_lengths(self, samples: Tensor | int) -> Tensor | int:
        """Frames of the hidden states (50 Hz) for so many samples."""
        return self.encoder_embed.output_lengths(num_frames(samples))

    def output_lengths(self, samples: Tensor | int) -> Tensor | int:
        """Exact frames of ``encoder_out`` for so many samples (16 kHz)."""
        factor = self.config.output_downsampling_factor
        return (self.hidden_lengths(samples) + factor - 1) // factor

    def encode(self, fbank: Tensor, fbank_lens: Tensor) -> SpearOutput:
        """Encode fbank (B, T, num_mel_bins), 100 Hz, with lengths (B,)."""
        x = self.encoder_embed(fbank)
        x_lens = self.encoder_embed.output_lengths(fbank_lens)
        out, out_lens, hidden_states = self.encoder(x, x_lens)
        return SpearOutput(out, out_lens, hidden_states, x_lens)

    def forward(self, speech: Tensor, lengths: Tensor) -> SpearOutput:
        """Encode waveforms.

        Args:
            speech: (B, samples) float in [-1, 1], 16 kHz.
            lengths: (B,) samples of each.

        Raises:
            ValueError: an utterance too short for one output frame.
        """
        shortest = int(lengths.min())
        if shortest < self.min_samples:
            raise ValueError(
                f"an utterance of {shortest} samples is shorter than one output "
                f"frame: at least {self.min_samples} samples at 16 kHz are needed"
            )
        return self.encode(*self.fbank(speech, lengths))

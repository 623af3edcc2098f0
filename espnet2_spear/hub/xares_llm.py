"""A SPEAR student under the API of XARES-LLM: an encoder that a language model hears.

XARES-LLM (https://github.com/xiaomi-research/xares-llm) takes its class by a path, as
XARES does, and wants masks besides: ``SPEAR_MODEL=STUDENT python -m xares_llm.run
espnet2_spear.hub.xares_llm.SpearXaresLlmEncoder task1 task1``.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A module of XARES-LLM has one name that ends with "Encoder".
from espnet2_spear.hub import xares


class SpearXaresLlmEncoder(xares.SpearXaresEncoder):
    """Encoder with the interface that XARES-LLM expects; audio is at 16 kHz.

    Attributes:
        output_dim: channels of the student.

    Args:
        **kwargs: none is needed.

    Raises:
        CheckpointError: the environment names no student, or one that cannot be opened.
    """

    padding = "exact"  # what stands beside an utterance does not change its frames

    def __init__(self, **kwargs: object) -> None:
        super().__init__()

    @torch.no_grad()  # not inference_mode: a projector learns from the features
    def forward(
        self, audio: Tensor, audio_attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode (B, samples) in [-1, 1]; 50 frames a second.

        Args:
            audio: (B, samples).
            audio_attention_mask: (B, samples), 1 for samples of the audio, which come
                first, and 0 for padding; None: no padding.

        Returns:
            the mean of the normalised layers (B, T, output_dim), and the mask of its
            frames (B, T), int64, 1 for those to keep.

        Raises:
            InputError: see :meth:`.xares.SpearXaresEncoder.forward`.
        """
        mask = audio_attention_mask
        lengths = None if mask is None else mask.long().sum(dim=1)
        layers, lens = self.student.normalized_layers(audio, lengths)
        frames = torch.arange(layers.size(2), device=layers.device)
        return layers.mean(dim=0), (frames < lens.to(frames.device)[:, None]).long()

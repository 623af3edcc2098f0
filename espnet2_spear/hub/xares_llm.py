"""A SPEAR student under the API of XARES-LLM: an encoder that a language model hears.

XARES-LLM (https://github.com/xiaomi-research/xares-llm) takes its class by a path, as
XARES does, and wants masks besides: ``SPEAR_MODEL=STUDENT python -m xares_llm.run
espnet2_spear.hub.xares_llm.SpearXaresLlmEncoder task1 task1``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# A module of XARES-LLM has one name that ends with "Encoder".
from espnet2_spear.hub import xares


class SpearXaresLlmEncoder(xares.SpearXaresEncoder):
    """What XARES-LLM asks of an encoder; audio is at 16 kHz.

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

    @torch.inference_mode()
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
        audio = torch.atleast_2d(audio).float()
        lengths = torch.full((len(audio),), audio.size(1), device=audio.device)
        if audio_attention_mask is not None:
            lengths = audio_attention_mask.long().sum(dim=1)
        audio = self.student.pad_short(audio)
        out = self.student(audio, lengths.clamp(min=self.student.min_samples))
        layers = [F.layer_norm(x, x.shape[-1:]) for x in out.hidden_states]
        features = torch.stack(layers).mean(dim=0)
        frames = torch.arange(features.size(1), device=features.device)
        lens = out.hidden_states_lens.to(features.device)
        return features, (frames < lens[:, None]).long()

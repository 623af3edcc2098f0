"""A SPEAR student in transformers."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.spear.checks import InputError
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import ZipformerConfig
from espnet2_spear.zipformer.fbank import Fbank

from .configuration_spear import SpearConfig


@dataclass
class SpearModelOutput(ModelOutput):
    """What the student says of a batch.

    Attributes:
        encoder_out: (B, T', C), 50 Hz or 25 Hz.
        encoder_out_lens: (B,) frames.
        hidden_states: one (B, T, C) per layer, always 50 Hz; None if not asked for.
        hidden_states_lens: (B,) frames at 50 Hz.
    """

    encoder_out: Tensor | None = None
    encoder_out_lens: Tensor | None = None
    hidden_states: list[Tensor] | None = None
    hidden_states_lens: Tensor | None = None


class SpearStudent(nn.Module):
    """Holds the network where the released checkpoints' names expect it."""

    def __init__(self, config: ZipformerConfig) -> None:
        super().__init__()
        self.model = SpearEncoder(config)


class SpearModel(PreTrainedModel):
    """A student for ``AutoModel``; tensors are named as in the released checkpoints.

    Args:
        config: its configuration.
    """

    config_class = SpearConfig
    base_model_prefix = "spear"
    main_input_name = "audio"

    def __init__(self, config: SpearConfig) -> None:
        super().__init__(config)
        names = {f.name for f in fields(ZipformerConfig)}
        known = {k: v for k, v in config.to_dict().items() if k in names}
        self.model = SpearStudent(ZipformerConfig.from_dict(known))
        self._fbank_is_ready = False
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep what the network's own constructor set."""

    @property
    def student(self) -> SpearEncoder:
        """The network itself, with ``encode`` and ``streaming_forward``."""
        if not self._fbank_is_ready:
            # Built without memory at first, as transformers does, its constants are
            # not in the checkpoint.
            fbank = Fbank(self.model.model.config.num_mel_bins)
            self.model.model.fbank = fbank.to(self.device)
            self._fbank_is_ready = True
        return self.model.model

    def forward(
        self,
        audio: Tensor,
        audio_lens: Tensor | None = None,
        return_middle_layers: bool = True,
        sampling_rate: int = SAMPLE_RATE,
    ) -> SpearModelOutput:
        """Encode waveforms.

        Args:
            audio: (B, samples) float in [-1, 1], 16 kHz.
            audio_lens: (B,) samples of each; None: all of them.
            return_middle_layers: also return the output of every layer.
            sampling_rate: of the audio in Hz, only to be checked.

        Raises:
            InputError: another sampling rate, samples that are no numbers, an
                utterance too short for one frame, or a model that is not float32.
        """
        if sampling_rate != SAMPLE_RATE:
            raise InputError(
                f"audio at {sampling_rate} Hz: resample it to {SAMPLE_RATE} Hz"
            )
        if self.dtype != torch.float32:
            raise InputError(
                f"the model is {self.dtype}: load it with dtype=torch.float32, "
                "and use torch.autocast for speed"
            )
        if audio_lens is None:
            audio_lens = torch.full((len(audio),), audio.size(1), device=audio.device)
        out = self.student(audio, audio_lens)
        middle = (out.hidden_states, out.hidden_states_lens)
        return SpearModelOutput(
            out.encoder_out,
            out.encoder_out_lens,
            *(middle if return_middle_layers else (None, None)),
        )

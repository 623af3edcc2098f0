"""A SPEAR student in transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.spear.checks import InputError
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import ZipformerConfig
from espnet2_spear.zipformer.encoder import ZipformerStack

from .configuration_spear import SpearConfig

UNREAD = re.compile(r"layers\.\d+\.bypass_scale$")  # of a layer, not of its bypasses


@dataclass
class SpearModelOutput(ModelOutput):
    """Outputs of the student for a batch.

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

    @property
    def last_hidden_state(self) -> Tensor | None:
        """The output by the name that most models of transformers give it."""
        return self.encoder_out


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
    supports_gradient_checkpointing = True
    # Masks and positions are passed beside the frames: a device has all or nothing.
    _no_split_modules = ["SpearStudent"]

    def __init__(self, config: SpearConfig) -> None:
        super().__init__(config)
        names = {f.name for f in fields(ZipformerConfig)}
        known = {k: v for k, v in config.to_dict().items() if k in names}
        self.model = SpearStudent(ZipformerConfig.from_dict(known))
        self._freeze_unused()
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load a model; what nothing reads asks for no gradient afterwards."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze_unused()
        return loaded

    def _freeze_unused(self) -> None:
        """DistributedDataParallel would wait for their gradients."""
        for name, parameter in self.named_parameters():
            if name.endswith("mask_emb") or UNREAD.search(name):
                parameter.requires_grad_(False)

    def _pipeline(self) -> None:
        """Name the file of the pipeline: what is imported is saved and fetched, too."""
        from .pipeline_spear import SpearFeaturePipeline  # noqa: F401

    def _init_weights(self, module: nn.Module) -> None:
        """Keep what the network's own constructor set."""

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable | None = None,
        every_n_layers: int = 1,
    ) -> None:
        """Keep only the input of each layer in training, by the network's own means."""
        self.gradient_checkpointing = enable
        for module in self.modules():
            if isinstance(module, ZipformerStack):
                module.checkpointing = enable

    @property
    def student(self) -> SpearEncoder:
        """The network itself, with ``encode`` and ``streaming_forward``."""
        return self.model.model

    def forward(
        self,
        audio: Tensor,
        audio_lens: Tensor | None = None,
        return_middle_layers: bool = True,
        sampling_rate: int = SAMPLE_RATE,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SpearModelOutput | tuple:
        """Encode waveforms.

        Args:
            audio: (B, samples) float in [-1, 1], 16 kHz.
            audio_lens: (B,) samples of each; None: what the mask says, or all of them.
            return_middle_layers: also return the output of every layer.
            sampling_rate: of the audio in Hz, only to be checked.
            attention_mask: (B, samples), 1 within an utterance and 0 behind it, as
                the feature extractor makes it.
            output_hidden_states: given, goes before ``return_middle_layers``.
            return_dict: False: a tuple, without what is not there.

        Raises:
            InputError: another sampling rate, samples with NaN or infinity or in
                another scale, or an utterance too short for one frame.
        """
        if sampling_rate != SAMPLE_RATE:
            raise InputError(
                f"audio at {sampling_rate} Hz: resample it to {SAMPLE_RATE} Hz"
            )
        if audio_lens is None:
            audio_lens = torch.full((len(audio),), audio.size(1), device=audio.device)
            if attention_mask is not None:
                audio_lens = attention_mask.sum(dim=1)
        if output_hidden_states is None:
            output_hidden_states = return_middle_layers
        self.student.look_at(audio, audio_lens)
        out = self.student(audio, audio_lens, output_hidden_states)
        middle = (out.hidden_states, out.hidden_states_lens)
        output = SpearModelOutput(
            out.encoder_out,
            out.encoder_out_lens,
            *(middle if output_hidden_states else (None, None)),
        )
        return output.to_tuple() if return_dict is False else output

"""A SPEAR student as an encoder of MARBLE (v2), a benchmark of music representations.

MARBLE (https://github.com/a43992899/MARBLE) takes an encoder from outside by its path,
in the YAML file of a task: ``model.init_args.encoder.class_path:
espnet2_spear.hub.marble.SpearMarbleEncoder``, ``init_args: {path: STUDENT}``. Its
transforms choose among hidden states, weigh and pool them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.hub.load import load_model
from espnet2_spear.zipformer.config import ConfigError
from espnet2_spear.zipformer.fbank import FRAME_SHIFT


class SpearMarbleEncoder(nn.Module):
    """Encoder with the interface that MARBLE expects.

    Attributes:
        SAMPLING_RATE: 16000 Hz, to be the task's ``sample_rate`` as well.
        TOKEN_RATE: 50 frames a second.
        NUM_FEATURES: channels of the student, a decoder's ``in_dim``.
        NUM_LAYERS: hidden states that there are to choose from.

    Args:
        path: of a student; see :func:`~espnet2_spear.hub.load.load_model`.
        train_mode: ``freeze``, or ``full`` to train the student, too.

    Raises:
        CheckpointError: the student cannot be opened.
        ConfigError: another ``train_mode``.
    """

    SAMPLING_RATE = SAMPLE_RATE
    TOKEN_RATE = SAMPLE_RATE // (2 * FRAME_SHIFT)

    def __init__(self, path: str, train_mode: str = "freeze") -> None:
        super().__init__()
        if train_mode not in ("freeze", "full"):
            raise ConfigError(f"train_mode: freeze or full, not {train_mode!r}")
        self.frozen = train_mode == "freeze"
        self.student = load_model(path)
        if self.frozen:
            self.student.requires_grad_(False)
        else:
            self.student.train()  # Lightning leaves modes as they are
            self.student.mask_emb.requires_grad_(False)  # nothing masks here
        self.NUM_FEATURES = int(self.student.output_size())
        self.NUM_LAYERS = self.student.num_layers

    def train(self, mode: bool = True) -> SpearMarbleEncoder:
        """Set the mode; a frozen student stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.student.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Hidden states of sounds, each layer normalised over its channels.

        Args:
            x: (B, samples) or (B, 1, samples), in [-1, 1].

        Returns:
            of each layer (B, T, NUM_FEATURES) float32.

        Raises:
            InputError: no sound, or sounds that are empty, longer than an hour, no
                numbers, in another scale or of several channels.
        """
        with torch.set_grad_enabled(not self.frozen and torch.is_grad_enabled()):
            states, _ = self.student.normalized_layers(
                x.squeeze(1) if x.ndim == 3 else x
            )
        return states.unbind()

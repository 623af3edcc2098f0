"""A SPEAR student under the API of XARES, a benchmark of audio encoders.

XARES (https://github.com/jimbozhang/xares) takes a module as a path, and makes an
object without arguments of its class whose name ends with ``Encoder``. So the student
is named by the environment: ``SPEAR_MODEL=STUDENT python -m xares.run
espnet2_spear/hub/xares.py src/tasks/*.py``.

The embedding is the mean of all normalised layers.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.errors import CheckpointError
from espnet2_spear.hub.load import load_model
from espnet2_spear.zipformer.fbank import FRAME_SHIFT

MODEL = "SPEAR_MODEL"


class SpearXaresEncoder(nn.Module):
    """Encoder with the interface that XARES expects.

    Attributes:
        sampling_rate: 16000 Hz.
        output_dim: channels of the student.
        hop_size_in_ms: 20.

    Raises:
        CheckpointError: the environment names no student, or one that cannot be opened.
    """

    sampling_rate = SAMPLE_RATE
    hop_size_in_ms = 2 * FRAME_SHIFT * 1000 // SAMPLE_RATE
    padding: str | None = None  # of the student; None: as it was trained

    def __init__(self) -> None:
        super().__init__()
        path = os.environ.get(MODEL)
        if not path:
            raise CheckpointError(
                f"{MODEL} is not set: export {MODEL}=/path/to/student"
            )
        self.student = load_model(path, padding=self.padding)
        self.output_dim = self.student.output_size()

    @torch.inference_mode()
    def forward(self, audio: Tensor) -> Tensor:
        """Encode (B, samples), or (samples,), in [-1, 1]: (B, T, output_dim).

        Audio too short for one frame gets silence behind it.

        Raises:
            InputError: no sound, or sounds that are empty, longer than an hour, no
                numbers or in another scale.
        """
        return self.student.normalized_layers(audio)[0].mean(dim=0)

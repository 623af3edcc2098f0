"""A SPEAR student under the API of HEAR, the benchmark of audio representations.

The API (https://hearbenchmark.com/hear-api.html) wants a module with these three
functions: ``hear-validator espnet2_spear.hub.hear -m STUDENT``.

A timestamp's embedding is the mean of all normalised layers; a scene's is the mean over
time of all of them, one behind the other, so that a task can choose among them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.hub.load import load_model as load_student
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.fbank import FRAME_SHIFT

HOP = 2 * FRAME_SHIFT
# Frame j is made of fbank frames 2j to 2j + 8. In a trained student it tells most of
# 2j + 2 (benchmarks/README.md, frontend.py), the middle of which is taken for its time.
MIDDLE = 2.5 * FRAME_SHIFT
# Samples mirrored at both ends, so that frames reach to both.
FRONT, BACK = MIDDLE - HOP / 2, 2 * HOP + FRAME_SHIFT
MAX_SAMPLES = 60 * SAMPLE_RATE  # of a batch that is computed at once


class HearModel(nn.Module):
    """A student and what the API asks of a model.

    Args:
        student: in eval mode.

    Attributes:
        sample_rate: 16000 Hz.
        timestamp_embedding_size: C, channels of the student.
        scene_embedding_size: C times the number of layers.
    """

    sample_rate = SAMPLE_RATE

    def __init__(self, student: SpearEncoder) -> None:
        super().__init__()
        self.student = student
        self.timestamp_embedding_size = int(student.output_size())
        self.scene_embedding_size = self.timestamp_embedding_size * student.num_layers

    @torch.no_grad()
    def forward(self, audio: Tensor) -> Tensor:
        """Normalised hidden states (layers, B, T, C), 50 Hz, of audio (B, samples).

        Audio too short for one frame gets silence behind it.

        Raises:
            InputError: no sound, or sounds that are empty, longer than an hour, no
                numbers or in another scale.
        """
        audio = self.student.pad_short(audio.float())
        audio = F.pad(audio, (int(FRONT), BACK), mode="reflect")
        rows = max(1, MAX_SAMPLES // audio.size(1))
        parts = [self.student.normalized_layers(x)[0] for x in audio.split(rows)]
        return torch.cat(parts, dim=1)


def load_model(model_file_path: str = "") -> HearModel:
    """Open a student, whatever ``espnet2_spear.load_model`` opens.

    Raises:
        ValueError: no path; there is no default checkpoint that could be fetched.
        CheckpointError: no checkpoint there.
    """
    if not model_file_path:
        raise ValueError(
            "name the student's folder or file (hear-validator: -m PATH); nothing is "
            "downloaded by itself"
        )
    return HearModel(load_student(model_file_path))


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """Embed every 20 ms.

    Args:
        audio: (n_sounds, samples) in [-1, 1], 16 kHz.
        model: of :func:`load_model`.

    Returns:
        embeddings float32 (n_sounds, T, timestamp_embedding_size), and the middle of
        each in milliseconds (n_sounds, T).
    """
    embeddings = model(audio).mean(dim=0)
    number = torch.arange(embeddings.size(1), device=audio.device)
    times = (number * HOP + MIDDLE - FRONT) * (1000 / SAMPLE_RATE)
    return embeddings, times.expand(len(audio), -1)


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """Embed whole sounds: float32 (n_sounds, scene_embedding_size).

    Args:
        audio: (n_sounds, samples) in [-1, 1], 16 kHz.
        model: of :func:`load_model`.
    """
    return model(audio).mean(dim=2).transpose(0, 1).flatten(1)

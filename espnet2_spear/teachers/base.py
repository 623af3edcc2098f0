"""Base class of teachers: frozen networks from 16 kHz audio to embeddings."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.errors import UserError

# Options that say where weights lie, not what they are: two teachers that differ
# only here are the same teacher (their hashes are compared instead).
_PLACE_OPTIONS = ("weights", "sha256")


class TeacherError(UserError):
    """A teacher that cannot be built or used; the message says what to do."""


class Teacher(nn.Module, abc.ABC):
    """A frozen teacher; subclasses implement :meth:`embed`.

    Attributes:
        frame_rate: embeddings per second (Hz).
        dim: width of an embedding.
        min_samples: shortest audio taken, in samples at 16 kHz.
        max_samples: longest audio taken, or None for no limit.
        weights_sha256: hash of the file the weights came from.
        conf: the options the teacher was built with.
    """

    name: str = ""
    frame_rate: float
    dim: int
    min_samples: int = 400
    max_samples: int | None = None
    weights_sha256: str = ""

    def __init__(self) -> None:
        super().__init__()
        self.conf: dict[str, Any] = {}

    @abc.abstractmethod
    def embed(self, speech: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Compute embeddings of zero-padded audio.

        Args:
            speech: (B, samples) float32 in [-1, 1] at 16 kHz, zero past ``lengths``.
            lengths: (B,) int64, on the device of ``speech``.

        Returns:
            embeddings (B, T, dim) float32 and their lengths (B,) int64. What an
            utterance gets must not depend on the others in its batch.
        """

    @abc.abstractmethod
    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Return the number of frames (int64) of audio of ``lengths`` samples."""

    @torch.no_grad()
    def forward(self, speech: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Embed a batch of audio.

        Args:
            speech: (B, samples) float32 in [-1, 1] at 16 kHz.
            lengths: (B,) int64; samples past an utterance's length are ignored.

        Returns:
            embeddings (B, T, dim) float32, zero past their lengths, and the lengths
            (B,) int64.

        Raises:
            TeacherError: wrong shapes, or an utterance shorter than ``min_samples``
                or longer than ``max_samples``.
        """
        if speech.dim() != 2 or lengths.shape != speech.shape[:1]:
            raise TeacherError(
                f"speech must be (B, samples) and lengths (B,), not "
                f"{tuple(speech.shape)} and {tuple(lengths.shape)}"
            )
        lengths = lengths.to(speech.device, torch.int64)
        shortest, longest = int(lengths.min()), int(lengths.max())
        self.check_length(shortest)
        self.check_length(longest)
        if longest > speech.size(1):
            raise TeacherError(
                f"a length of {longest} samples exceeds the {speech.size(1)} given"
            )
        speech = speech[:, :longest].float()
        if shortest < longest:
            speech = speech.masked_fill(padding_mask(lengths, longest), 0.0)
        frames, frame_lengths = self.embed(speech, lengths)
        if int(frame_lengths.min()) < frames.size(1):
            mask = padding_mask(frame_lengths, frames.size(1))
            frames = frames.masked_fill(mask[..., None], 0.0)
        return frames, frame_lengths

    def check_length(self, samples: int) -> None:
        """Raise TeacherError if audio of so many samples cannot be embedded."""
        if samples < self.min_samples:
            raise TeacherError(
                f"{samples} samples are shorter than the {self.min_samples} that "
                f"teacher {self.name} needs for one frame; filter out short audio"
            )
        if self.max_samples is not None and samples > self.max_samples:
            raise TeacherError(
                f"{samples / SAMPLE_RATE:.2f} s is longer than the "
                f"{self.max_samples / SAMPLE_RATE:.2f} s that teacher {self.name} "
                "takes; cut it with segments"
            )

    def describe(self) -> dict[str, Any]:
        """Return what identifies the teacher, in primitives (for metadata)."""
        return {
            "teacher": self.name,
            "teacher_conf": dict(self.conf),
            "weights_sha256": self.weights_sha256,
            "dim": self.dim,
            "frame_rate": self.frame_rate,
        }

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode, also if a module around is set to training."""
        del mode
        return super().train(False)

    def freeze(self) -> Teacher:
        """Switch off gradients and training behaviour."""
        return self.requires_grad_(False).eval()


def without_padding(
    embed: Callable[[Tensor], Tensor], speech: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Embed a batch with a network whose output would depend on padding.

    Args:
        embed: maps (B, samples), without padding, to (B, T, dim).
        speech: (B, samples).
        lengths: (B,); utterances of one length are embedded together.

    Returns:
        (B, T, dim), zero past the lengths, and the lengths (B,).
    """
    frames: list[Tensor] = [speech[:0]] * len(speech)
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        results = embed(speech[rows, :length])
        for row, result in zip(rows.tolist(), results, strict=True):
            frames[row] = result
    counts = torch.tensor([len(x) for x in frames], device=speech.device)
    return torch.nn.utils.rnn.pad_sequence(frames, batch_first=True), counts


def padding_mask(lengths: Tensor, size: int) -> Tensor:
    """Return (B, size) bool, True past each length."""
    return torch.arange(size, device=lengths.device) >= lengths[:, None]


def difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Differences of two results of :meth:`Teacher.describe`, in words.

    Hashes of the weights are compared, the paths of their files are not.

    Returns:
        an empty string if both describe the same teacher.
    """

    def facts(description: Mapping[str, Any]) -> dict[str, Any]:
        flat = {k: v for k, v in description.items() if k != "teacher_conf"}
        conf = description.get("teacher_conf") or {}
        return {**flat, **{k: v for k, v in conf.items() if k not in _PLACE_OPTIONS}}

    left, right = facts(expected), facts(found)
    keys = [k for k in {**left, **right} if left.get(k) != right.get(k)]
    return "; ".join(f"{k} {left.get(k)!r} against {right.get(k)!r}" for k in keys)

"""What a student predicts of a masked utterance, to be looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PredictedTokens:
    """Codes of one teacher and their prediction, of T frames and N codebooks.

    Attributes:
        true: (T, N) int, negative where there is none.
        predicted: (T, N) int, the most probable codes.
        masked: (T,) bool.
        rate: frames per second.
        codebook_size: K.
    """

    true: Tensor
    predicted: Tensor
    masked: Tensor
    rate: float
    codebook_size: int

    def accuracy(self, masked: bool) -> Tensor:
        """Share (N,) of each codebook's codes that are right; nan if there is none.

        Args:
            masked: of masked frames, or of the others.
        """
        counted = (self.true >= 0) & (self.masked == masked)[:, None]
        right = (self.predicted == self.true) & counted
        return right.sum(0) / counted.sum(0)


@dataclass(frozen=True)
class Prediction:
    """What the student got of an utterance and what it made of it.

    Attributes:
        fbank: (T, mels) at 100 frames a second, with the masks.
        masked: (T,) bool, frames that were masked.
        teachers: teacher name -> tokens, of the teachers that the loss asks for.
    """

    fbank: Tensor
    masked: Tensor
    teachers: Mapping[str, PredictedTokens]

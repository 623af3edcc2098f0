"""Log-mel features beside those of the student, at the same frame rate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MODES = ("concat", "project")
# Of log-mel values of speech, so that both kinds of features are of size 1.
MEAN, STD = -7.0, 4.0


class LogMelFusion(nn.Module):
    """Joins the student's features with the fbank that it was given.

    Frame j (50 Hz) is joined with the fbank frames 2j and 2j + 1 (100 Hz), which are
    centred on samples 320 j + 80 and 320 j + 240: that is what the teacher's frame j
    is about, which the student's frame j was trained to predict. The fbank is scaled
    by constants, not by statistics of the utterance, and thus does not depend on what
    is in the batch or in the piece.

    Args:
        mode: ``concat`` puts the 2 x bins values behind the student's channels;
            ``project`` adds a learned projection of them, zero at first, to the
            features.
        num_mel_bins: width of the fbank.
        dim: channels of the student's features.

    Raises:
        ValueError: another mode.
    """

    def __init__(self, mode: str, num_mel_bins: int, dim: int) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"frontend spear: logmel '{mode}'; one of {MODES}")
        self.dim = dim + 2 * num_mel_bins if mode == "concat" else dim
        self.project = None
        if mode == "project":
            self.project = nn.Linear(2 * num_mel_bins, dim)
            nn.init.zeros_(self.project.weight)
            nn.init.zeros_(self.project.bias)

    def forward(self, features: Tensor, fbank: Tensor) -> Tensor:
        """Map (B, T, C) and fbank (B, >= 2 T, num_mel_bins) to (B, T, self.dim)."""
        frames = features.size(1)
        pairs = fbank[:, : 2 * frames].unflatten(1, (frames, 2)).flatten(2)
        pairs = (pairs - MEAN) / STD
        if self.project is None:
            return torch.cat([features, pairs], dim=-1)
        return features + self.project(pairs)

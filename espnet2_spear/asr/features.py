"""From a student's layers to features: which layers, log-mel beside them, frame rate.

All of it is computed in float32, whatever precision the student had.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODES = ("concat", "project")
# Of log-mel values of speech, so that both kinds of features are of size 1.
MEAN, STD = -7.0, 4.0


class Featurizer(nn.Module):
    """One layer, or a learned weighted sum of all layers, in float32.

    Args:
        num_layers: hidden states there are.
        layer: index of the only layer to use (negative: from the last), or None for
            the weighted sum, whose weights start equal.
        layer_norm: normalise every layer (without learned parameters) first; layers
            differ much in scale.
    """

    def __init__(self, num_layers: int, layer: int | None, layer_norm: bool) -> None:
        super().__init__()
        if layer is not None and not -num_layers <= layer < num_layers:
            raise ValueError(f"layer {layer}: the model has {num_layers} layers")
        self.layer = None if layer is None else layer % num_layers
        self.layer_norm = layer_norm
        if layer is None:
            # Any constant is an equal weight; of size 1, optimizers whose steps are
            # relative to a parameter's size learn it from the start.
            self.weights = nn.Parameter(torch.ones(num_layers))

    def forward(self, hidden_states: list[Tensor]) -> Tensor:
        """Map a list of (B, T, C), up to the layer used at least, to (B, T, C)."""
        if self.layer is not None:
            return self._norm(hidden_states[self.layer])
        weights = self.weights.softmax(dim=0)
        out = weights[0] * self._norm(hidden_states[0])
        for weight, hidden in zip(weights[1:], hidden_states[1:], strict=True):
            out = out + weight * self._norm(hidden)
        return out

    def _norm(self, x: Tensor) -> Tensor:
        x = x.float()
        return F.layer_norm(x, x.shape[-1:]) if self.layer_norm else x


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
        pairs = first_frames(fbank, 2 * frames).unflatten(1, (frames, 2)).flatten(2)
        pairs = (pairs - MEAN) / STD
        if self.project is None:
            return torch.cat([features, pairs], dim=-1)
        return features + self.project(pairs)


class FrameReducer(nn.Module):
    """A lower frame rate: the mean of neighbours, then neighbours side by side.

    What is left over at the end of an utterance is dropped, so that no output frame
    holds padding.

    Args:
        pool: frames whose mean becomes one frame.
        stack: consecutive frames (after ``pool``) that become one, of as many times
            the channels.
    """

    def __init__(self, pool: int = 1, stack: int = 1) -> None:
        super().__init__()
        for name, value in (("pool", pool), ("stack", stack)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"frontend spear: {name} is {value}; at least 1, a whole number"
                )
        self.pool = pool
        self.stack = stack
        self.factor = pool * stack

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T // factor, C * stack)."""
        if self.factor == 1:
            return x
        groups = x.size(1) // self.factor
        x = first_frames(x, groups * self.factor)
        x = x.unflatten(1, (groups, self.stack, self.pool)).mean(dim=3)
        return x.flatten(2)


def first_frames(x: Tensor, frames: int) -> Tensor:
    """x (B, T, C) without what lies behind so many frames, of which it has enough."""
    if torch.compiler.is_compiling():  # a graph must hold for any length
        return x.index_select(1, torch.arange(frames, device=x.device))
    return x[:, :frames]

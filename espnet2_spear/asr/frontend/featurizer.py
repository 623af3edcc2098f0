"""From a student's layers to features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
            self.weights = nn.Parameter(torch.zeros(num_layers))

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
        x = x[:, : x.size(1) // self.factor * self.factor]
        x = x.unflatten(1, (-1, self.stack, self.pool)).mean(dim=3)
        return x.flatten(2)

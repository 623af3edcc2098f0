"""Padding, chunk and mask information that is passed to every layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


class Past:
    """Frames that a streaming step takes over from the steps before it.

    Tensors are replaced, never changed, so that an earlier state stays usable.

    Args:
        tensors: name -> (B, frames, ...), read and replaced in place.
        prefix: where this part of the network keeps its own.
    """

    def __init__(self, tensors: dict[str, Tensor], prefix: str = "") -> None:
        self.tensors = tensors
        self.prefix = prefix

    def child(self, name: str) -> Past:
        """Return the past of a sub-module."""
        return Past(self.tensors, f"{self.prefix}{name}.")

    def extend(self, name: str, x: Tensor, keep: int | None) -> Tensor:
        """Put the kept frames before x, and keep the last ones of both.

        Args:
            name: which tensor.
            x: (B, T, ...) new frames.
            keep: how many frames the next step may want; None: all.

        Returns:
            (B, up to keep + T, ...).
        """
        key = self.prefix + name
        if key in self.tensors:
            x = torch.cat([self.tensors[key], x], dim=1)
        self.tensors[key] = x if keep is None else x[:, max(0, x.size(1) - keep) :]
        return x


@dataclass(frozen=True)
class Frames:
    """Padding, chunks and masks of a batch, at the frame rate of a stack.

    Attributes:
        padding: (B, T) bool, True behind the end of an utterance.
        exact: whether padding may never reach an utterance's frames.
        causal: whether convolutions are causal and attention goes by chunks.
        chunk: frames of a chunk; -1: everything is one chunk.
        left_chunks: chunks before its own that a frame attends to; -1: all.
        first: whether no frame was processed before these; a tensor (B,), if that
            differs between streams (with ``exact``, and whole chunks only).
        past: kept frames, in streaming.
        feature_mask: (B, 1, C) that training multiplies the frames by.
        pos: (2 T + L - 1, pos_dim) positional encoding, L kept frames before these.
        key_padding: (B, L + T) ``padding`` of the keys.
        seen: (T, 2) range [begin, end) of the keys that a query sees; None: all.
    """

    padding: Tensor
    exact: bool = False
    causal: bool = False
    chunk: int = -1
    left_chunks: int = -1
    first: bool | Tensor = True
    past: Past | None = None
    feature_mask: Tensor | None = None
    pos: Tensor | None = None
    key_padding: Tensor | None = None
    seen: Tensor | None = None

    def at(self, factor: int) -> Frames:
        """Return the same at 1 / factor of the rate."""
        chunk = self.chunk // factor if self.chunk > 0 else -1
        return replace(self, padding=self.padding[:, ::factor], chunk=chunk)

    def child(self, name: str) -> Frames:
        """Return the same for a named sub-module, which keeps its own past."""
        past = None if self.past is None else self.past.child(name)
        return replace(self, past=past)

    def with_keys(self, pos: Tensor, key_padding: Tensor) -> Frames:
        """Return the same with what attention needs."""
        return replace(self, pos=pos, key_padding=key_padding, seen=self._seen())

    @property
    def left(self) -> int | None:
        """Frames of left context; None: all."""
        return None if self.left_chunks < 0 else self.left_chunks * self.chunk

    def lengths(self) -> Tensor:
        """(B,) frames that are not padding."""
        return (~self.padding).sum(dim=1)

    def hold_last(self, x: Tensor) -> Tensor:
        """Repeat each utterance's last frame over its padding, in exact mode.

        So a group of frames that becomes one looks as it does for the utterance alone.
        """
        if not self.exact:
            return x
        last = (self.lengths() - 1).clamp(min=0)
        last = x[torch.arange(x.size(0), device=x.device), last]
        return torch.where(self.padding[..., None], last[:, None], x)

    def _seen(self) -> Tensor | None:
        """Build ``seen``: a query sees its own chunk and so many before it."""
        if not self.causal or self.chunk < 0 or self.past is not None:
            return None  # in streaming the kept frames are those to be seen
        t = torch.arange(self.padding.size(1), device=self.padding.device)
        # A query sees its whole chunk, also what comes later: it is computed at once.
        own = t - t % self.chunk
        begin = torch.zeros_like(own)
        if self.left_chunks >= 0:
            begin = (own - self.left_chunks * self.chunk).clamp(min=0)
        return torch.stack([begin, own + self.chunk], dim=1)

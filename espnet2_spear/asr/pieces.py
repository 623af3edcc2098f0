"""Features of long audio, computed piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from espnet2_spear.constants import SAMPLE_RATE, SAMPLES_PER_FRAME
from espnet2_spear.zipformer.config import ZipformerConfig

# Samples behind the start of its last frame that a piece needs: (9 - 1/2) fbank frames.
_TAIL = 1360 - SAMPLES_PER_FRAME


@dataclass(frozen=True)
class Chunks:
    """Sizes of the pieces of long audio, in frames (50 Hz).

    Attributes:
        size: frames that are kept of every piece.
        context: further frames before and behind them that the student sees.
    """

    size: int
    context: int

    @classmethod
    def of(
        cls,
        seconds: float,
        context_seconds: float,
        config: ZipformerConfig,
        factor: int,
    ) -> Chunks:
        """Round times up to what all stacks and the output's frame rate divide.

        Args:
            seconds: length of what is kept of a piece.
            context_seconds: context on either side.
            config: the student.
            factor: frames that become one output frame.

        Raises:
            ValueError: times that are not positive (context: negative).
        """
        if not (0 < seconds < math.inf) or not (0 <= context_seconds < math.inf):
            raise ValueError(
                f"frontend spear: chunk_seconds {seconds}, context_seconds "
                f"{context_seconds}; they must be positive (the context may be 0)"
            )
        unit = math.lcm(factor, *config.downsampling_factor)
        if config.causal and config.chunk_size > 0:
            unit = math.lcm(unit, config.chunk_size)
        size, context = (
            math.ceil(s * SAMPLE_RATE / SAMPLES_PER_FRAME / unit) * unit
            for s in (seconds, context_seconds)
        )
        return cls(size, context)

    @property
    def max_samples(self) -> int:
        """Longest audio that is not cut."""
        return (self.size + self.context) * SAMPLES_PER_FRAME


def in_chunks(
    compute: Callable[[Tensor, Tensor], Tensor],
    speech: Tensor,
    frames: list[int],
    lengths: Tensor,
    chunks: Chunks,
    factor: int,
) -> Tensor:
    """Compute features piece by piece.

    Each piece sees ``chunks.context`` frames on either side of those that are kept.
    Pieces begin where all stacks begin a group of frames, so that the features differ
    from those of the whole by the missing context only. Memory is that of one piece,
    besides the waveforms and the result.

    Args:
        compute: features (B, frames // factor, C) of waveforms (B, samples) and their
            lengths (B,).
        speech: (B, samples).
        frames: 50 Hz frames of each utterance.
        lengths: (B,) samples.
        chunks: how to cut.
        factor: frames that become one output frame.

    Returns:
        (B, max(frames) // factor, C); 0 behind the end of an utterance's last piece.
    """
    total = max(frames) // factor * factor
    out: Tensor | None = None
    for start in range(0, total, chunks.size):
        first = max(0, start - chunks.context)
        begin = first * SAMPLES_PER_FRAME
        end = (start + chunks.size + chunks.context) * SAMPLES_PER_FRAME + _TAIL
        rows = [i for i, n in enumerate(frames) if n // factor * factor > start]
        piece = speech[:, begin:end]
        piece_lens = (lengths - begin).clamp(max=piece.size(1))
        if len(rows) < len(frames):
            index = torch.tensor(rows, device=speech.device)
            piece, piece_lens = piece[index], piece_lens[index.to(lengths.device)]
            piece = piece[:, : int(piece_lens.max())]
        features = compute(piece, piece_lens)
        skip, size = (
            (start - first) // factor,
            min(chunks.size, total - start) // factor,
        )
        features = features[:, skip : skip + size]
        if out is None:
            out = features.new_zeros(len(frames), total // factor, features.size(2))
        at = start // factor
        out[rows, at : at + features.size(1)] = features
    return out

"""Masks of pre-training: spans of time and of mel channels of the fbank.

The masked prediction of arXiv 2510.25955, as the authors' scripts compute it [5.1],
hides spans of the 100 Hz fbank (not of the embedding, as HuBERT does), in this order:

1. channels: spans of mel bins become 0, the same bins in all frames of an utterance
   (0 is a loud log-mel value, not silence);
2. time: spans of frames become one learned vector, also where channels were masked.

Spans of s frames may overlap, so that fewer frames are masked than the probability p
says: about 1 - (1 - p / s)^s, that is 49 % for p = 0.65 and 40 % for 0.5 (s = 10).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_spans(
    lengths: Tensor,
    size: int,
    prob: float,
    span: int,
    min_spans: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample overlapping spans for a batch, on the device of ``lengths``.

    An item of length L gets n = floor(prob L / span + u), u ~ U(0, 1), spans, at
    least ``min_spans`` and at most L // span; their starts are drawn without
    replacement from [0, L - span), as in fairseq's span sampler.

    Args:
        lengths: (B,) lengths of the items.
        size: length of the mask; no shorter than any item.
        prob: masked share of the item if no spans overlapped.
        span: length of a span.
        min_spans: fewest spans of an item long enough to hold them.
        generator: source of randomness on that device; torch's own if None.

    Returns:
        (B, size) bool, True where masked.
    """
    if prob <= 0:
        return torch.zeros(
            lengths.size(0), size, dtype=torch.bool, device=lengths.device
        )
    noise = torch.rand(
        lengths.size(0), size + 1, device=lengths.device, generator=generator
    )
    wanted = (prob * lengths / span + noise[:, 0]).floor().clamp(min=min_spans)
    wanted = torch.minimum(wanted, lengths // span)
    position = torch.arange(size, device=lengths.device)
    # Starts without replacement: those of the lowest random keys. Keys of starts that
    # are not allowed (2.0) come last, however few others there are.
    key = noise[:, 1:].masked_fill(position >= (lengths - span)[:, None], 2.0)
    rank = key.argsort(dim=1).argsort(dim=1)
    starts = (rank < wanted[:, None]) & (key < 2.0)
    padded = F.pad(starts.float(), (span - 1, 0))
    return F.max_pool1d(padded[:, None], span, stride=1)[:, 0] > 0


@dataclass(frozen=True)
class SpanMasker:
    """Channel and time masks of pre-training.

    Defaults are those of the unified (speech and audio) models: with them 49 % of
    the frames and 23 % of the mel channels are masked; speech-only models use
    ``time_prob`` 0.5 and ``channel_span`` 15, which mask 40 % and 23 %.

    Attributes:
        time_prob: wanted share of frames, before overlaps.
        time_span: fbank frames (10 ms) of a span.
        time_min_spans: fewest spans of an utterance.
        channel_prob: wanted share of mel channels, before overlaps.
        channel_span: mel channels of a span.

    Raises:
        ValueError: a share that is not in 0..1, or a span length or count that is not
            an integer of at least 1 (``time_min_spans``: 0).
    """

    time_prob: float = 0.65
    time_span: int = 10
    time_min_spans: int = 2
    channel_prob: float = 0.25
    channel_span: int = 20

    def __post_init__(self) -> None:
        for name in ("time_prob", "channel_prob"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0 <= value <= 1):
                raise ValueError(f"{name} {value!r}: expected a share in 0..1")
        least_of = {"time_span": 1, "time_min_spans": 0, "channel_span": 1}
        for name, least in least_of.items():
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= least):
                raise ValueError(
                    f"{name} {value!r}: expected a whole number >= {least}"
                )

    def __call__(
        self,
        fbank: Tensor,
        lengths: Tensor,
        mask_emb: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mask a batch; padding is never masked in time.

        Args:
            fbank: (B, T, num_mel_bins), 100 Hz.
            lengths: (B,) frames.
            mask_emb: (num_mel_bins,) learned vector.
            generator: source of randomness on the fbank's device.

        Returns:
            the masked fbank and the time mask (B, T) bool.
        """
        b, t, bins = fbank.shape
        lengths = lengths.to(fbank.device)
        channels = sample_spans(
            torch.full((b,), bins, device=fbank.device),
            bins,
            self.channel_prob,
            self.channel_span,
            min_spans=0,
            generator=generator,
        )
        frames = sample_spans(
            lengths, t, self.time_prob, self.time_span, self.time_min_spans, generator
        )
        fbank = fbank.masked_fill(channels[:, None], 0.0)
        return torch.where(frames[..., None], mask_emb.to(fbank.dtype), fbank), frames


def pool_time_mask(mask: Tensor, factor: int, frames: int) -> Tensor:
    """Bring a mask of fbank frames to the rate of the student's output.

    Args:
        mask: (B, T) bool, 100 Hz.
        factor: fbank frames per output frame (2 at 50 Hz, 4 at 25 Hz).
        frames: output frames.

    Returns:
        (B, frames) bool; True where at least half of the fbank frames are masked.
    """
    short = max(0, frames * factor - mask.size(1))
    mask = F.pad(mask.float(), (0, short))[:, None]
    return F.avg_pool1d(mask, factor)[:, 0, :frames] >= 0.5

"""Checks of what a caller hands to the network."""

from __future__ import annotations

import torch
from torch import Tensor

from espnet2_spear.errors import UserError


class InputError(UserError):
    """A batch that cannot be encoded; the message names the utterances."""


def check_waveforms(speech: Tensor, lengths: Tensor) -> None:
    """Refuse what is no batch of waveforms.

    Args:
        speech: (B, samples) float.
        lengths: (B,) samples of each, integers.

    Raises:
        InputError: no utterances, other shapes, or other kinds of numbers.
    """
    check_any(speech)
    if speech.dim() != 2 or lengths.shape != speech.shape[:1]:
        raise InputError(
            f"expected speech (B, samples) and lengths (B,), got "
            f"{tuple(speech.shape)} and {tuple(lengths.shape)}"
        )
    if not speech.is_floating_point():
        raise InputError(
            f"speech is {speech.dtype}; float samples in [-1, 1] are needed: divide "
            "16-bit samples by 32768"
        )
    check_whole(lengths)


def check_finite(speech: Tensor, lengths: Tensor) -> None:
    """Refuse NaN and infinite samples within the utterances.

    Args:
        speech: (B, samples).
        lengths: (B,) samples of each; what lies behind is not looked at.

    Raises:
        InputError: such samples; names the utterances by their index in the batch.
    """
    bad = ~torch.isfinite(speech)
    position = torch.arange(speech.size(1), device=speech.device)
    bad &= position < lengths[:, None].to(speech.device)
    bad_items = bad.any(dim=1)
    if bool(bad_items.any()):
        raise InputError(
            f"utterances {bad_items.nonzero().flatten().tolist()} of the batch hold "
            "samples that are NaN or infinite; leave them out or repair the audio"
        )


def check_batch(fbank: Tensor, lengths: Tensor, num_mel_bins: int) -> None:
    """Refuse features and lengths that do not fit together.

    Args:
        fbank: (B, T, num_mel_bins), 100 Hz.
        lengths: (B,) frames of each.
        num_mel_bins: expected width.

    Raises:
        InputError: no utterances, another shape, fewer than the 9 frames that one
            output frame needs, or a length beyond the tensor; names the utterances
            by their index in the batch.
    """
    check_any(fbank)
    check_width(fbank, num_mel_bins)
    if lengths.shape != fbank.shape[:1]:
        raise InputError(f"{fbank.size(0)} utterances, lengths {tuple(lengths.shape)}")
    check_whole(lengths)
    bad = outside(lengths, 9, fbank.size(1))
    if bad:
        raise InputError(
            f"{bad}, must be in 9..{fbank.size(1)} fbank frames: leave shorter "
            "utterances out (9 frames are 85 ms)"
        )


def outside(lengths: Tensor, least: int, most: int) -> str:
    """Say which of the lengths (B,) are not in ``least..most``; empty if all are."""
    found = ((lengths < least) | (lengths > most)).nonzero().flatten()
    if not len(found):
        return ""
    return (
        f"utterances {found.tolist()} of the batch: lengths {lengths[found].tolist()}"
    )


def check_whole(lengths: Tensor) -> None:
    """Raise InputError if lengths are no whole numbers."""
    if lengths.is_floating_point():
        raise InputError(f"lengths are {lengths.dtype}; whole numbers are needed")


def check_any(batch: Tensor) -> None:
    """Raise InputError if there is no utterance in the batch."""
    if batch.dim() > 0 and len(batch) == 0:
        raise InputError("the batch is empty: it needs at least one utterance")


def check_width(fbank: Tensor, num_mel_bins: int) -> None:
    """Raise InputError unless fbank is (B, T, num_mel_bins), float."""
    if fbank.dim() != 3 or fbank.size(2) != num_mel_bins:
        raise InputError(
            f"expected fbank (B, T, {num_mel_bins}), got {tuple(fbank.shape)}"
        )
    if not fbank.is_floating_point():
        raise InputError(f"fbank is {fbank.dtype}; floating point numbers are needed")

"""Checks of what a caller hands to a student: at its public calls, nowhere below.

Shapes and types are always checked. Values (lengths, NaN, scale) are looked at where
the host holds them: on a GPU a look is a wait, and a graph cannot depend on it. Whoever
moves a batch to a GPU checks it before (``as_batch``, the data loader), or waits for
the look where no training waits with it (inference, benchmarks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from espnet2_spear.constants import MAX_PEAK
from espnet2_spear.errors import UserError
from espnet2_spear.zipformer.conv_embed import MIN_FRAMES


class InputError(UserError):
    """A batch that cannot be encoded; the message names the utterances."""


def have_values(*tensors: Tensor) -> bool:
    """Whether there are values to look at: no graph is made, and no tensor is fake."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return all(type(x) is Tensor for x in tensors)


def on_host(*tensors: Tensor) -> bool:
    """Whether values can be looked at without a wait, and outside of a graph."""
    return have_values(*tensors) and all(x.device.type == "cpu" for x in tensors)


def check_waveforms(
    speech: Tensor, lengths: Tensor, least: int | None, wait: bool = False
) -> None:
    """Refuse what is no batch of waveforms.

    Args:
        speech: (B, samples) float.
        lengths: (B,) samples of each, integers.
        least: fewest samples of an utterance; None: values are not looked at.
        wait: look at values on a GPU, too.

    Raises:
        InputError: no utterances, other shapes, other kinds of numbers, lengths that
            do not fit, or samples that :func:`check_samples` refuses; names the
            utterances by their index in the batch.
    """
    _check_any(speech)
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
    _check_whole(lengths)
    can_look = have_values if wait else on_host
    if least is None or not can_look(lengths):
        return
    check_shortest(lengths.tolist(), least)
    bad = _outside(lengths, 1, speech.size(1))
    if bad:
        raise InputError(f"{bad}, must be in 1..{speech.size(1)} samples")
    if can_look(speech):
        check_samples(speech, lengths)


def check_samples(speech: Tensor, lengths: Tensor) -> None:
    """Refuse NaN, infinite samples and other scales within the utterances.

    Nothing is looked at while a graph is made. On a GPU the host waits.

    Args:
        speech: (B, samples).
        lengths: (B,) samples of each; what lies behind is not looked at.

    Raises:
        InputError: such samples; names the utterances by their index in the batch.
    """
    if not have_values(speech, lengths):
        return
    # By their extremes, which need no memory; hours of audio come here, too.
    utterances = zip(speech.detach(), lengths.tolist(), strict=True)
    extremes = torch.stack(
        [torch.stack(x[:n].aminmax()) if n else x.new_zeros(2) for x, n in utterances]
    ).tolist()
    bad = [i for i, ends in enumerate(extremes) if not all(map(math.isfinite, ends))]
    if bad:
        raise InputError(
            f"utterances {bad} of the batch hold samples that are NaN or infinite; "
            "leave them out or repair the audio"
        )
    for i, (low, high) in enumerate(extremes):
        if max(-low, high) > MAX_PEAK:
            raise InputError(
                f"utterance {i} of the batch: samples from {low:.6g} to {high:.6g}, "
                "where float samples lie in [-1, 1]: divide 16-bit samples by 32768"
            )


def check_shortest(lengths: Sequence[int], least: int) -> None:
    """Raise InputError unless each utterance has at least so many samples."""
    short = [i for i, n in enumerate(lengths) if n < least]
    if short:
        alone = len(lengths) == 1
        who = "an utterance" if alone else f"utterances {short} of the batch"
        raise InputError(
            f"{who}: {min(lengths)} samples are shorter than one output frame, at "
            f"least {least} samples at 16 kHz are needed; leave short "
            "utterances out"
        )


def check_features(fbank: Tensor, lengths: Tensor, num_mel_bins: int) -> None:
    """Refuse features and lengths of other shapes and types.

    Args:
        fbank: (B, T, num_mel_bins), 100 Hz.
        lengths: (B,) frames of each.
        num_mel_bins: expected width.

    Raises:
        InputError: such ones, or no utterances.
    """
    _check_any(fbank)
    if fbank.dim() != 3 or fbank.size(2) != num_mel_bins:
        raise InputError(
            f"expected fbank (B, T, {num_mel_bins}), got {tuple(fbank.shape)}"
        )
    if not fbank.is_floating_point():
        raise InputError(f"fbank is {fbank.dtype}; floating point numbers are needed")
    _check_whole(lengths)
    if lengths.shape != fbank.shape[:1]:
        raise InputError(f"{fbank.size(0)} utterances, lengths {tuple(lengths.shape)}")


def check_fbank(fbank: Tensor, lengths: Tensor, num_mel_bins: int) -> None:
    """Refuse what :func:`check_features` does, and lengths of no whole utterance.

    Raises:
        InputError: in addition, fewer than the 9 frames that one output frame needs,
            or a length beyond the tensor; names the utterances by their index in the
            batch.
    """
    check_features(fbank, lengths, num_mel_bins)
    if not on_host(lengths):
        return
    bad = _outside(lengths, MIN_FRAMES, fbank.size(1))
    if bad:
        raise InputError(
            f"{bad}, must be in {MIN_FRAMES}..{fbank.size(1)} fbank frames: leave "
            f"shorter utterances out ({MIN_FRAMES} frames are 85 ms)"
        )


def check_piece(
    lengths: Tensor,
    most: int,
    total: Tensor,
    ended: Tensor,
    least: int,
    unit: str,
) -> None:
    """Refuse a piece that does not continue a stream.

    Args:
        lengths: (B,) frames or samples of each utterance in the piece.
        most: of the piece.
        total: (B,) of them received before.
        ended: (B,) bool, utterances whose end was seen.
        least: of them that every utterance must have now; 0 before the stream's end.
        unit: ``frames`` or ``samples``.

    Raises:
        InputError: the piece does not fit.
    """
    if total.shape != lengths.shape:
        raise InputError(
            f"a stream of {total.size(0)} utterances continues with {lengths.size(0)}"
        )
    if not on_host(lengths, total, ended):
        return
    if _outside(lengths, 0, most):
        raise InputError(f"lengths {lengths.tolist()} must be in 0..{most} {unit}")
    if bool((ended & (lengths > 0)).any()):
        raise InputError(
            f"lengths {lengths.tolist()}: utterances that had ended "
            f"({ended.nonzero().flatten().tolist()}) go on"
        )
    total = total + lengths
    if int(total.min()) < least:
        raise InputError(
            f"a stream of {total.tolist()} {unit} ends: at least {least} are needed"
        )


def _outside(lengths: Tensor, least: int, most: int) -> str:
    """Say which of the lengths (B,) are not in ``least..most``; empty if all are."""
    found = ((lengths < least) | (lengths > most)).nonzero().flatten()
    if not len(found):
        return ""
    return (
        f"utterances {found.tolist()} of the batch: lengths {lengths[found].tolist()}"
    )


def _check_whole(lengths: Tensor) -> None:
    if lengths.is_floating_point():
        raise InputError(f"lengths are {lengths.dtype}; whole numbers are needed")


def _check_any(batch: Tensor) -> None:
    if batch.dim() > 0 and batch.size(0) == 0:
        raise InputError("the batch is empty: it needs at least one utterance")

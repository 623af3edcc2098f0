"""Waveforms from anywhere as the batch that a student takes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.audio import MAX_RATE, MIN_RATE, resample
from espnet2_spear.spear.checks import InputError, check_samples

OTHER_RATE = ("refuse", "resample")


def as_batch(
    waveforms: Sequence[Tensor | np.ndarray],
    sampling_rate: int,
    other_rate: str = "refuse",
) -> tuple[Tensor, Tensor]:
    """Check waveforms and pad them into one batch: ``model(*as_batch(...))``.

    Args:
        waveforms: (samples,) each, float in [-1, 1], mono.
        sampling_rate: theirs, in Hz.
        other_rate: what to do unless that is 16000 Hz: ``refuse``, or ``resample``
            with a warning. Students have seen 16 kHz audio: what was recorded at
            less lacks the upper bands of their fbank.

    Returns:
        speech (B, samples) float32, 16 kHz, and lengths (B,).

    Raises:
        InputError: another rate that is refused or impossible, no waveforms, several
            channels, integers, other scales, or empty or not finite ones, named by
            their index.
    """
    if other_rate not in OTHER_RATE:
        raise InputError(f"other_rate '{other_rate}': one of {OTHER_RATE}")
    if not MIN_RATE <= sampling_rate <= MAX_RATE:
        raise InputError(
            f"sampling rate {sampling_rate} Hz is outside {MIN_RATE}..{MAX_RATE} Hz"
        )
    if sampling_rate != SAMPLE_RATE and other_rate == "refuse":
        raise InputError(
            f"audio at {sampling_rate} Hz, a student takes {SAMPLE_RATE} Hz: resample "
            'it, or say other_rate="resample"'
        )
    items = [torch.as_tensor(w) for w in waveforms]
    if not items:
        raise InputError("no waveforms")
    for i, item in enumerate(items):
        if item.dim() != 1:
            raise InputError(
                f"waveform {i} has shape {tuple(item.shape)}, not (samples,): take "
                "one channel, or the mean of all"
            )
        if not item.is_floating_point():
            raise InputError(
                f"waveform {i} is {item.dtype}; float samples in [-1, 1] are needed: "
                "divide 16-bit samples by 32768"
            )
        if len(item) == 0:
            raise InputError(f"waveform {i} is empty; leave it out")
    items = [item.float() for item in items]
    if sampling_rate != SAMPLE_RATE:
        logging.warning(
            f"{len(items)} waveforms are resampled from {sampling_rate} to "
            f"{SAMPLE_RATE} Hz"
        )
        items = [
            torch.from_numpy(resample(w.cpu().numpy(), sampling_rate)).to(w.device)
            for w in items
        ]
    lengths = torch.tensor([len(item) for item in items], device=items[0].device)
    speech = pad_sequence(items, batch_first=True)
    check_samples(speech, lengths)
    return speech, lengths

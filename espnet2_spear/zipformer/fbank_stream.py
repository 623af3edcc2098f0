"""Fbank of a waveform that comes in pieces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from espnet2_spear.zipformer.checks import InputError, check_finite, check_waveforms
from espnet2_spear.zipformer.fbank import (
    FRAME_LENGTH,
    FRAME_SHIFT,
    LEFT,
    PADDING_VALUE,
    Fbank,
    num_frames,
)


@dataclass(frozen=True)
class FbankState:
    """What later frames need of the samples so far.

    Attributes:
        samples: (B, n) the last samples, from ``start`` on.
        start: index of the first of them.
        lengths: (B,) samples of each utterance so far.
        frames: frames that were computed.
    """

    samples: Tensor
    start: int
    lengths: Tensor
    frames: int


def streaming_fbank(
    fbank: Fbank,
    speech: Tensor,
    lengths: Tensor,
    state: FbankState | None = None,
    last: bool = False,
) -> tuple[Tensor, Tensor, FbankState]:
    """Compute the frames that a further piece of the waveforms completes.

    Over all calls the frames are those of ``fbank`` on the whole waveforms. A frame
    is complete when the 280 samples from its shift's start on have come.

    Args:
        fbank: the features.
        speech: (B, n) float in [-1, 1], the next n samples, 16 kHz; any n.
        lengths: (B,) how many of them belong to each utterance: n, or less where it
            ends here; 0 from then on.
        state: what the previous call returned; None at first.
        last: whether all utterances end here.

    Returns:
        frames (B, T, num_mel_bins), 100 Hz, how many of them belong to each utterance,
        and the state for the next call; frames and lengths are what the student's
        ``streaming_forward`` takes.

    Raises:
        InputError: no batch of waveforms, samples that are no numbers, pieces that do
            not fit together, or an utterance without samples.
    """
    check_waveforms(speech, lengths)
    lengths = lengths.to(speech.device)
    if bool(((lengths < 0) | (lengths > speech.size(1))).any()):
        raise InputError(
            f"lengths {lengths.tolist()} must be in 0..{speech.size(1)} samples"
        )
    check_finite(speech, lengths)
    start, done = 0, 0
    if state is not None:
        if state.samples.size(0) != speech.size(0):
            raise InputError(
                f"a stream of {state.samples.size(0)} utterances continues with "
                f"{speech.size(0)}"
            )
        open_ = state.lengths == state.start + state.samples.size(1)
        if bool((~open_ & (lengths > 0)).any()):
            raise InputError(
                f"lengths {lengths.tolist()}: utterances that had ended go on"
            )
        lengths = state.lengths + lengths
        speech = torch.cat([state.samples, speech], dim=1)
        start, done = state.start, state.frames
    if last and bool((lengths < 1).any()):
        raise InputError(f"a stream of {lengths.tolist()} samples ends")

    # Frames of the piece, which starts a whole number of shifts into the waveform.
    size, skip = speech.size(1), done - start // FRAME_SHIFT
    ready = (
        num_frames(size) if last else (size - FRAME_LENGTH + LEFT) // FRAME_SHIFT + 1
    )
    if ready <= skip:
        frames = speech.new_zeros(speech.size(0), 0, fbank.num_mel_bins)
        new = FbankState(speech, start, lengths, done)
        return frames, torch.zeros_like(lengths), new
    frames, _ = fbank(speech, (lengths - start).clamp(1, size))
    frames = frames[:, skip:ready]
    # Utterances that have not ended have no partial frame among these.
    frame_lens = (num_frames(lengths) - done).clamp(0, frames.size(1))
    behind = torch.arange(frames.size(1), device=frames.device) >= frame_lens[:, None]
    frames = frames.masked_fill(behind[..., None], PADDING_VALUE)
    done += frames.size(1)
    # One shift more than the next frame's own, so that nothing is mirrored there.
    keep = max(0, done - 1) * FRAME_SHIFT
    new = FbankState(speech[:, keep - start :], keep, lengths, done)
    return frames, frame_lens, new

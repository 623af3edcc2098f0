"""Kaldi-compatible log-mel fbank, batched, as the released models were trained on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.zipformer.fusion import replaceable

FRAME_LENGTH = 400  # samples, 25 ms
FRAME_SHIFT = 160  # samples, 10 ms
FFT_SIZE = 512
PREEMPHASIS = 0.97
LOW_FREQ = 20.0
HIGH_FREQ = 7600.0
LOG_FLOOR = 1.1920928955078125e-07  # float32 epsilon
PADDING_VALUE = math.log(1e-10)
# The window of frame t is centred on sample 160 t + 80.
LEFT = FRAME_LENGTH // 2 - FRAME_SHIFT // 2
Samples = TypeVar("Samples", int, Tensor)


def mel_filterbank(num_mel_bins: int) -> Tensor:
    """Triangular Kaldi mel filters.

    Triangles are linear in mel = 1127 ln(1 + f / 700) between 20 and 7600 Hz and
    have unit height; the Nyquist bin has weight 0. With 128 bins the second filter
    is narrower than an FFT bin and therefore empty, as in the reference.

    Returns:
        (FFT_SIZE // 2 + 1, num_mel_bins) float32.
    """

    def mel(freq: np.ndarray | float) -> np.ndarray:
        return 1127.0 * np.log1p(np.asarray(freq) / 700.0)

    # In numpy: the filters exist whatever torch's default device is, meta included.
    edges = np.linspace(mel(LOW_FREQ), mel(HIGH_FREQ), num_mel_bins + 2)
    m = mel(np.arange(FFT_SIZE // 2) * (SAMPLE_RATE / FFT_SIZE))[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    up = (m - left) / (centre - left)
    down = (right - m) / (right - centre)
    weights = np.zeros((FFT_SIZE // 2 + 1, num_mel_bins), dtype=np.float32)
    weights[:-1] = np.minimum(up, down).clip(min=0.0)
    return torch.from_numpy(weights)


def num_frames(samples: Samples) -> Samples:
    """Fbank frames (100 Hz) of so many samples at 16 kHz."""
    return (samples + FRAME_SHIFT // 2) // FRAME_SHIFT


class Fbank(nn.Module):
    """Log-mel fbank of a padded batch of waveforms.

    The recipe is Kaldi's with snip_edges off, dither off and Povey's window
    (symmetric Hann to the power 0.85), on samples in [-1, 1]. Every utterance is
    mirrored at its own end, so its frames do not depend on the batch around it.
    It has no parameters and adds nothing to a state dict.

    Args:
        num_mel_bins: number of mel filters.
    """

    def __init__(self, num_mel_bins: int = 128) -> None:
        super().__init__()
        self.num_mel_bins = num_mel_bins
        self._set_constants(None)
        # transformers builds networks without memory and then gives tensors that are in
        # no checkpoint whatever the memory holds.
        self._without_values = self.window.device.type == "meta"

    def _set_constants(self, device: torch.device | None) -> None:
        window = torch.hann_window(FRAME_LENGTH, periodic=False, dtype=torch.float64)
        mel = mel_filterbank(self.num_mel_bins).repeat_interleave(2, dim=0)
        window = window.pow(0.85).float().to(device)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("mel", mel.to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fbank:
        """Move to a device; filters stay float32 where a whole model is converted."""
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, value in kept.items():
            if getattr(self, name).dtype != value.dtype:
                setattr(self, name, value.to(getattr(self, name).device))
        return self

    def forward(self, speech: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the fbank.

        Args:
            speech: (B, samples) float waveforms in [-1, 1], 16 kHz.
            lengths: (B,) samples of each; 1 <= lengths <= samples.

        Returns:
            fbank (B, T, num_mel_bins) float32, log(1e-10) in the padding, and its
            lengths (B,), (samples + 80) // 160 each.
        """
        if self._without_values:
            self._set_constants(speech.device)
            self._without_values = False
        n = lengths.to(speech.device)
        frames = num_frames(speech.size(1))
        with torch.autocast(speech.device.type, enabled=False):
            x = _mirrored(speech.float(), n, frames)
            windows = x.unfold(1, FRAME_LENGTH, FRAME_SHIFT)
            fbank = log_mel(windows, self.window, self.mel)
        behind = torch.arange(frames, device=speech.device) >= num_frames(n)[:, None]
        fbank = fbank.masked_fill(behind[..., None], PADDING_VALUE)
        return fbank, num_frames(lengths)


@replaceable
def log_mel(x: Tensor, window: Tensor, mel: Tensor) -> Tensor:
    """Map windows of samples to log-mel values.

    Args:
        x: (B, T, FRAME_LENGTH).
        window: (FRAME_LENGTH,).
        mel: (FFT_SIZE + 2, bins), weights of real and imaginary parts in turn.

    Returns:
        (B, T, bins).
    """
    x = x - x.mean(dim=-1, keepdim=True)
    before = torch.cat([x[..., :1], x[..., :-1]], dim=-1)
    x = torch.sub(x, before, alpha=PREEMPHASIS) * window
    spectrum = torch.view_as_real(torch.fft.rfft(x, n=FFT_SIZE)).flatten(-2)
    return torch.matmul(spectrum.square(), mel).clamp(min=LOG_FLOOR).log()


def _mirrored(speech: Tensor, lengths: Tensor, frames: int) -> Tensor:
    """Samples that so many frames cover, with both edges of utterances mirrored.

    Args:
        speech: (B, samples).
        lengths: (B,) samples of each, on the same device.
        frames: number of frames.

    Returns:
        (B, (frames - 1) * FRAME_SHIFT + FRAME_LENGTH), from sample -LEFT on; further
        behind an utterance than its own frames reach, anything.
    """
    size = (frames - 1) * FRAME_SHIFT + FRAME_LENGTH
    behind = size + FRAME_LENGTH - LEFT - speech.size(1)
    x = F.pad(speech, (LEFT, behind))
    n = lengths[:, None]
    near = torch.arange(FRAME_LENGTH, device=speech.device)
    before = (near[:LEFT] - LEFT).expand(speech.size(0), -1)
    for position in (before, n + near):
        # Very short utterances are mirrored repeatedly.
        index = torch.where(position < 0, -1 - position, position).remainder(2 * n)
        index = torch.minimum(index, 2 * n - 1 - index)
        x.scatter_(1, position + LEFT, speech.gather(1, index))
    return x[:, :size]

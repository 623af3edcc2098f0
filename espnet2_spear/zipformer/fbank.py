"""Kaldi-compatible log-mel fbank, batched, as the released models were trained on."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from espnet2_spear.zipformer.checks import InputError

SAMPLE_RATE = 16000
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


def num_frames(samples: Tensor | int) -> Tensor | int:
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
        window = torch.hann_window(FRAME_LENGTH, periodic=False, dtype=torch.float64)
        self.register_buffer("window", window.pow(0.85).float(), persistent=False)
        self.register_buffer("mel", mel_filterbank(num_mel_bins), persistent=False)

    def forward(self, speech: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the fbank.

        Args:
            speech: (B, samples) float waveforms in [-1, 1], 16 kHz.
            lengths: (B,) samples of each; 1 <= lengths <= samples.

        Returns:
            fbank (B, T, num_mel_bins) float32, log(1e-10) in the padding, and its
            lengths (B,), (samples + 80) // 160 each.

        Raises:
            InputError: a length that is 0 or greater than the tensor.
        """
        if speech.dim() != 2:
            raise InputError(f"speech must be (B, samples), got {tuple(speech.shape)}")
        if bool(((lengths < 1) | (lengths > speech.size(1))).any()):
            raise InputError(
                f"lengths {lengths.tolist()} must be in 1..{speech.size(1)} samples"
            )
        with torch.autocast(device_type=speech.device.type, enabled=False):
            return self._fbank(speech.float(), lengths)

    def _fbank(self, speech: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        out_lens = num_frames(lengths)
        frames = int(num_frames(speech.size(1)))
        position = torch.arange(
            -LEFT, (frames - 1) * FRAME_SHIFT + FRAME_LENGTH - LEFT
        ).to(speech.device)
        position = torch.where(position < 0, -1 - position, position)
        n = lengths[:, None].to(speech.device)
        # Mirror at the end of each utterance; very short ones mirror repeatedly.
        index = position.remainder(2 * n)
        index = torch.minimum(index, 2 * n - 1 - index)
        x = speech.gather(1, index).unfold(1, FRAME_LENGTH, FRAME_SHIFT)
        x = x - x.mean(dim=-1, keepdim=True)
        previous = torch.cat([x[..., :1], x[..., :-1]], dim=-1)
        x = (x - PREEMPHASIS * previous) * self.window
        spectrum = torch.fft.rfft(x, n=FFT_SIZE)
        power = spectrum.real.square() + spectrum.imag.square()
        fbank = torch.matmul(power, self.mel).clamp_(min=LOG_FLOOR).log_()
        pad = torch.arange(frames, device=speech.device)[None] >= out_lens[:, None]
        return fbank.masked_fill(pad[..., None], PADDING_VALUE), out_lens

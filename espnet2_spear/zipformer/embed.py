"""Convolutional embedding: 100 Hz fbank to 50 Hz frames of the encoder's width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from espnet2_spear.zipformer.scaling import BiasNorm, swoosh_l, swoosh_r


class ConvNeXt(nn.Module):
    """Residual block: 7 x 7 depthwise, then two pointwise convolutions.

    Args:
        channels: input and output channels; the hidden ones are three times as many.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise_conv = nn.Conv2d(
            channels, channels, kernel_size=7, padding=3, groups=channels
        )
        self.pointwise_conv1 = nn.Conv2d(channels, 3 * channels, kernel_size=1)
        self.pointwise_conv2 = nn.Conv2d(3 * channels, channels, kernel_size=1)
        with torch.no_grad():
            self.pointwise_conv2.weight.mul_(0.01)
            self.pointwise_conv2.bias.uniform_(-0.001, 0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, T, F) to the same shape."""
        y = swoosh_l(self.pointwise_conv1(self.depthwise_conv(x)))
        return x + self.pointwise_conv2(y)


class ConvEmbed(nn.Module):
    """Embedding of the fbank.

    Three 3 x 3 convolutions (strides 1, 2 and (1, 2) in (time, frequency)) with
    SwooshR, a ConvNeXt block and a projection. T' = (T - 7) // 2.

    Args:
        num_mel_bins: width of the fbank.
        dim: output channels.
        channels: output channels of the three convolutions.
    """

    def __init__(
        self, num_mel_bins: int, dim: int, channels: tuple[int, int, int]
    ) -> None:
        super().__init__()
        c1, c2, c3 = channels
        # Keys as in the released checkpoints, whose other slots hold functions.
        self.conv = nn.ModuleDict(
            {
                "0": nn.Conv2d(1, c1, kernel_size=3, padding=(0, 1)),
                "4": nn.Conv2d(c1, c2, kernel_size=3, stride=2),
                "7": nn.Conv2d(c2, c3, kernel_size=3, stride=(1, 2)),
            }
        )
        self.convnext = ConvNeXt(c3)
        freq = ((num_mel_bins - 1) // 2 - 1) // 2
        self.out = nn.Linear(c3 * freq, dim)
        self.out_norm = BiasNorm(dim)

    @staticmethod
    def output_lengths(lengths: Tensor | int) -> Tensor | int:
        """Frames (50 Hz) for so many fbank frames (100 Hz)."""
        return (lengths - 7) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map fbank (B, T, num_mel_bins), T >= 9, to (B, (T - 7) // 2, dim)."""
        # Channels last: three times as fast on a CPU, forward and backward, where
        # few channels make the default layout's convolutions slow.
        x = x[:, None].to(memory_format=torch.channels_last)
        for conv in self.conv.values():
            x = swoosh_r(conv(x))
        x = self.convnext(x)
        x = self.out(x.transpose(1, 2).flatten(2))
        return self.out_norm(x)

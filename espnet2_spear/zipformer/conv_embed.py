"""Convolutional embedding: 100 Hz fbank to 50 Hz frames of the encoder's width.

"Conv-Embed" of the Zipformer (arXiv 2310.11230, 3.1), with SPEAR's 128 mel channels.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet2_spear.zipformer.fbank import Samples
from espnet2_spear.zipformer.fusion import replaceable
from espnet2_spear.zipformer.regularizers import (
    SharedDropout,
    balancer,
    scale_grad,
    sequence_mask,
    whiten,
)
from espnet2_spear.zipformer.scaling import BiasNorm, swoosh_l, swoosh_r
from espnet2_spear.zipformer.schedule import BatchCount, Scheduled

CONVNEXT_SKIP: Scheduled = ((0, 0.2), (20000, 0.015))
FIRST_GRAD_SCALE = 0.2
MIN_FRAMES = 9  # fbank frames (100 Hz) of one output frame
CONVNEXT_REACH = 3  # frames that the ConvNeXt block looks back and ahead
# Without gradients, output frames (of all utterances together) computed at once: what
# stays in the caches of a CPU, or fills another device. And the fewest of each
# utterance: 2 x 3 frames are computed twice in every block.
BLOCK_FRAMES = {"cpu": 1024, "other": 2**15}
MIN_BLOCK = 64


class ConvNeXt(nn.Module):
    """Residual block: 7 x 7 depthwise, then two pointwise convolutions.

    Args:
        channels: input and output channels; the hidden ones are three times as many.
        count: given, the regularisers of training are on.
    """

    def __init__(self, channels: int, count: BatchCount | None = None) -> None:
        super().__init__()
        self.count = count
        self.depthwise_conv = nn.Conv2d(
            channels, channels, kernel_size=7, padding=3, groups=channels
        )
        self.pointwise_conv1 = nn.Conv2d(channels, 3 * channels, kernel_size=1)
        self.pointwise_conv2 = nn.Conv2d(3 * channels, channels, kernel_size=1)
        with torch.no_grad():
            self.pointwise_conv2.weight.mul_(0.01)
            self.pointwise_conv2.get_parameter("bias").uniform_(-0.001, 0.001)
        self.balance_hidden = balancer(
            count,
            min_positive=0.3,
            max_positive=1.0,
            min_abs=0.75,
            max_abs=5.0,
            channel_dim=1,
        )
        self.balance_out = balancer(
            count,
            min_positive=0.4,
            max_positive=0.6,
            min_abs=1.0,
            max_abs=6.0,
            channel_dim=1,
        )
        self.whiten = whiten(count, 5.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, T, F) to the same shape; zeros surround the frames."""
        return self._residual(x, conv2d(self.depthwise_conv, x))

    def inner(self, x: Tensor) -> Tensor:
        """Map (B, C, 3 + T + 3, F) to the T frames that have all neighbours."""
        conv = self.depthwise_conv
        y = F.conv2d(x, conv.weight, conv.bias, padding=(0, 3), groups=conv.groups)
        return self._residual(x[:, :, CONVNEXT_REACH:-CONVNEXT_REACH], y)

    def _residual(self, x: Tensor, y: Tensor) -> Tensor:
        y = pointwise(self, y)
        if self.training and self.count is not None:
            y = y * sequence_mask(y, self.count.at(CONVNEXT_SKIP))
        x = self.balance_out(x + y)
        return self.whiten(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@replaceable
def pointwise(module: ConvNeXt, x: Tensor) -> Tensor:
    """Map (B, C, T, F) by the two 1 x 1 convolutions of a module."""
    hidden = module.balance_hidden(conv2d(module.pointwise_conv1, x))
    return conv2d(module.pointwise_conv2, swoosh_l(hidden))


@replaceable
def swoosh_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return conv(swoosh_r(x)); the caller must not need x, unless for a gradient."""
    return conv2d(conv, swoosh_r(x))


def conv2d(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return conv(x).

    The gradient of the weight lies in memory as the weight does, which DDP asks for;
    those of channels-last convolutions by themselves do not.
    """
    weight = conv.weight.flatten(1).unflatten(1, conv.weight.shape[1:])
    return F.conv2d(x, weight, conv.bias, conv.stride, conv.padding, 1, conv.groups)


@replaceable
def project(layer: nn.Linear, x: Tensor) -> Tensor:
    """Map (B, C, T, F) to (B, T, out) by a linear map of C times F features."""
    return layer(x.transpose(1, 2).flatten(2))


class ConvEmbed(nn.Module):
    """Embedding of the fbank.

    Three 3 x 3 convolutions (strides 1, 2 and (1, 2) in (time, frequency)) with
    SwooshR, a ConvNeXt block and a projection. T' = (T - 7) // 2.

    Args:
        num_mel_bins: width of the fbank.
        dim: output channels.
        channels: output channels of the three convolutions.
        count: given, the regularisers of training are on.
    """

    def __init__(
        self,
        num_mel_bins: int,
        dim: int,
        channels: tuple[int, int, int],
        count: BatchCount | None = None,
    ) -> None:
        super().__init__()
        self.count = count
        c1, c2, c3 = channels
        # Keys as in the released checkpoints, whose other slots hold functions.
        self.conv = nn.ModuleDict(
            {
                "0": nn.Conv2d(1, c1, kernel_size=3, padding=(0, 1)),
                "4": nn.Conv2d(c1, c2, kernel_size=3, stride=2),
                "7": nn.Conv2d(c2, c3, kernel_size=3, stride=(1, 2)),
            }
        )
        self.balance = nn.ModuleList(
            balancer(count, max_abs=max_abs, channel_dim=1)
            for max_abs in (1.0, 4.0, 4.0)
        )
        self.convnext = ConvNeXt(c3, count)
        freq = ((num_mel_bins - 1) // 2 - 1) // 2
        self.out = nn.Linear(c3 * freq, dim)
        self.whiten = whiten(count, ((0, 4.0), (20000, 8.0)), grad_scale=0.02)
        self.out_norm = BiasNorm(dim, count)
        self.dropout = SharedDropout(count)

    @staticmethod
    def output_lengths(lengths: Samples) -> Samples:
        """Frames (50 Hz) for so many fbank frames (100 Hz)."""
        return (lengths - 7) // 2

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embed.

        Args:
            x: (B, T, num_mel_bins) fbank, T >= MIN_FRAMES.
            lengths: (B,) frames of each; given, padding is zeroed so that it cannot
                reach an utterance's frames (``padding="exact"``).

        Returns:
            (B, (T - 7) // 2, dim).
        """
        out_lens = None if lengths is None else self.output_lengths(lengths)
        frames = self.output_lengths(x.size(1))
        # A graph must hold for any length.
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            together = BLOCK_FRAMES.get(x.device.type, BLOCK_FRAMES["other"])
            size = max(MIN_BLOCK, together // x.size(0))
            if frames > size:
                starts = range(0, frames, size)
                blocks = [self._block(x, i, i + size, out_lens) for i in starts]
                return torch.cat(blocks, dim=1)
        x = self.convolve(x)
        if out_lens is not None:
            x = silence(x, out_lens)
        return self.project(self.convnext(x))

    def _block(self, x: Tensor, start: int, end: int, lengths: Tensor | None) -> Tensor:
        """Output frames start to end, of the same numbers as if all were computed.

        Memory does not grow with the length of the utterance, and what is computed
        stays in the caches of a CPU.
        """
        frames = self.output_lengths(x.size(1))
        first, last = start - CONVNEXT_REACH, min(end, frames) + CONVNEXT_REACH
        inside = slice(max(0, first), min(frames, last))
        y = self.convolve(x[:, 2 * inside.start : 2 * inside.stop + 7])
        if lengths is not None:
            y = silence(y, lengths, inside.start)
        around = (inside.start - first, last - inside.stop)  # zeros before and after
        y = F.pad(y, (0, 0, *around))
        return self.project(self.convnext.inner(y))

    def convolve(self, x: Tensor) -> Tensor:
        """Map fbank (B, T, num_mel_bins) to (B, C, (T - 7) // 2, F)."""
        first, second, third = cast("list[nn.Conv2d]", self.conv.values())
        # Channels last: three times as fast on a CPU, forward and backward, where
        # few channels make the default layout's convolutions slow.
        x = conv2d(first, x[:, None].to(memory_format=torch.channels_last))
        if self.training and self.count is not None:
            x = scale_grad(x, FIRST_GRAD_SCALE)
        x = self.balance[0](x)
        x = self.balance[1](swoosh_conv(second, x))
        x = self.balance[2](swoosh_conv(third, x))
        return swoosh_r(x)

    def project(self, x: Tensor) -> Tensor:
        """Map (B, C, T, F) to (B, T, dim)."""
        x = self.whiten(project(self.out, x))
        return self.dropout(self.out_norm(x))


def silence(x: Tensor, lengths: Tensor, start: int = 0) -> Tensor:
    """Zero what lies behind the end of each utterance.

    Args:
        x: (B, C, T, F), whose first frame has index ``start``.
        lengths: (B,) frames of each.
    """
    position = torch.arange(start, start + x.size(2), device=x.device)
    behind = position >= lengths[:, None].to(x.device)
    return x.masked_fill(behind[:, None, :, None], 0.0)

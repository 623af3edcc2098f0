"""Convolutional embedding: 100 Hz fbank to 50 Hz frames of the encoder's width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet2_spear.zipformer.linear import (
    linear_map,
    on_cpu,
    pointwise_pair,
    swoosh_conv,
)
from espnet2_spear.zipformer.regularizers import (
    Balancer,
    balancer,
    scale_grad,
    sequence_mask,
    shared_dropout,
    whiten,
)
from espnet2_spear.zipformer.scaling import (
    SWOOSH_R,
    BiasNorm,
    swoosh_,
    swoosh_l,
    swoosh_r,
)
from espnet2_spear.zipformer.schedule import BatchCount, Scheduled

CONVNEXT_SKIP: Scheduled = ((0, 0.2), (20000, 0.015))
FIRST_GRAD_SCALE = 0.2
CONVNEXT_REACH = 3  # frames that the ConvNeXt block looks back and ahead
# Without gradients, output frames (of all utterances together) computed at once, and
# the fewest of each: 2 x 3 frames are computed twice in every block.
BLOCK_FRAMES, MIN_BLOCK = 1024, 64


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
            self.pointwise_conv2.bias.uniform_(-0.001, 0.001)
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
        return self._residual(x, self.depthwise_conv(x))

    def activated(self, x: Tensor) -> Tensor:
        """Map x to forward(swoosh_r(x)); with gradients, less is kept for them."""
        if not (torch.is_grad_enabled() and on_cpu(x, self.depthwise_conv)):
            return self(swoosh_r(x))
        return self._residual(swoosh_r(x), swoosh_conv(self.depthwise_conv, x))

    def inner(self, x: Tensor) -> Tensor:
        """Map (B, C, 3 + T + 3, F) to the T frames that have all neighbours."""
        conv = self.depthwise_conv
        y = F.conv2d(x, conv.weight, conv.bias, padding=(0, 3), groups=conv.groups)
        return self._residual(x[:, :, CONVNEXT_REACH:-CONVNEXT_REACH], y)

    def _residual(self, x: Tensor, y: Tensor) -> Tensor:
        y = self._pointwise(y)
        if self.training and self.count is not None:
            x = torch.addcmul(x, y, sequence_mask(y, self.count.at(CONVNEXT_SKIP)))
        else:
            x = x + y if torch.is_grad_enabled() else y.add_(x)
        x = self.balance_out(x)
        return self.whiten(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _pointwise(self, y: Tensor) -> Tensor:
        first, second = self.pointwise_conv1, self.pointwise_conv2
        if not on_cpu(y, first, second):
            return second(swoosh_l(self.balance_hidden(first(y))))
        balanced = isinstance(self.balance_hidden, Balancer) and y.requires_grad
        limits = self.balance_hidden.draw() if balanced else None
        return pointwise_pair(first, second, y, limits)


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
        self.dropout = shared_dropout(count)

    @staticmethod
    def output_lengths(lengths: Tensor | int) -> Tensor | int:
        """Frames (50 Hz) for so many fbank frames (100 Hz)."""
        return (lengths - 7) // 2

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embed.

        Args:
            x: (B, T, num_mel_bins) fbank, T >= 9.
            lengths: (B,) frames of each, if what lies behind them must not reach the
                last frames before (``padding="exact"``).

        Returns:
            (B, (T - 7) // 2, dim).
        """
        out_lens = None if lengths is None else self.output_lengths(lengths)
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            size = max(MIN_BLOCK, BLOCK_FRAMES // x.size(0))
            starts = range(0, self.output_lengths(x.size(1)), size)
            if len(starts) > 1:
                blocks = (self._block(x, i, i + size, out_lens) for i in starts)
                return torch.cat(list(blocks), dim=1)
        if out_lens is None and torch.is_grad_enabled():
            return self.project(self.convnext.activated(self.convolve(x, False)))
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

    def convolve(self, x: Tensor, last: bool = True) -> Tensor:
        """Map fbank (B, T, num_mel_bins) to (B, C, (T - 7) // 2, F).

        Args:
            x: the fbank.
            last: whether the last activation is part of it.
        """
        # Channels last: three times as fast on a CPU, forward and backward, where
        # few channels make the default layout's convolutions slow.
        x = x[:, None].to(memory_format=torch.channels_last)
        keeps = torch.is_grad_enabled()

        def activate(x: Tensor) -> Tensor:
            return swoosh_r(x) if keeps else swoosh_(x, SWOOSH_R)

        for i, (conv, balance) in enumerate(
            zip(self.conv.values(), self.balance, strict=True)
        ):
            if i > 0 and keeps and on_cpu(x, conv):
                x = swoosh_conv(conv, x)
            elif keeps and on_cpu(x, conv):
                # Its gradient then lies in memory as it does, which DDP asks for.
                weight = conv.weight.flatten(1).unflatten(1, conv.weight.shape[1:])
                x = F.conv2d(x, weight, conv.bias, conv.stride, conv.padding)
            else:
                x = conv(activate(x) if i > 0 else x)
            if i == 0 and self.training and self.count is not None:
                x = scale_grad(x, FIRST_GRAD_SCALE)
            x = balance(x)
        return activate(x) if last else x

    def project(self, x: Tensor) -> Tensor:
        """Map (B, C, T, F) to (B, T, dim)."""
        if on_cpu(x, self.out):
            # Reorders the weight, not the much larger x, which is channels last.
            weight = self.out.weight.unflatten(1, (x.size(1), -1))
            weight = weight.transpose(1, 2).flatten(1)
            x = linear_map(x.permute(0, 2, 3, 1).flatten(2), weight, self.out.bias)
        else:
            x = self.out(x.transpose(1, 2).flatten(2))
        x = self.whiten(x)
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

"""Activation and normalisation functions of the Zipformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet2_spear.zipformer.fusion import fusible
from espnet2_spear.zipformer.regularizers import limit_parameter, sequence_mask
from espnet2_spear.zipformer.schedule import BatchCount, Scheduled

BYPASS_MIN: Scheduled = ((0, 0.9), (20000, 0.2))
LOG_SCALE_LIMIT = 1.5


class _Swoosh(torch.autograd.Function):
    """softplus(x - shift) - 0.08 x - offset, keeping only x for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, shift: float, offset: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.shift = shift
        return _swoosh(x, shift, offset)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return _swoosh_gradient(x, grad, ctx.shift), None, None


@fusible
def _swoosh(x: Tensor, shift: float, offset: float) -> Tensor:
    return F.softplus(x - shift).add_(x, alpha=-0.08).sub_(offset)


@fusible
def _swoosh_gradient(x: Tensor, grad: Tensor, shift: float) -> Tensor:
    return torch.sigmoid_(x - shift).sub_(0.08).mul_(grad)


@fusible
def _bias_norm(x: Tensor, bias: Tensor, log_scale: Tensor) -> Tensor:
    rms = (x - bias).square().mean(dim=-1, keepdim=True).rsqrt()
    return x * (rms * log_scale.exp())


@fusible
def _interpolate(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """torch.lerp of tensors of different dtypes."""
    return start + (end - start) * share


def swoosh_l(x: Tensor) -> Tensor:
    """SwooshL(x) = log(1 + exp(x - 4)) - 0.08 x - 0.035 (Zipformer, eq. 5)."""
    return _Swoosh.apply(x, 4.0, 0.035)


def swoosh_r(x: Tensor) -> Tensor:
    """SwooshR(x) = log(1 + exp(x - 1)) - 0.08 x - 0.313261687 (Zipformer, eq. 4)."""
    return _Swoosh.apply(x, 1.0, 0.313261687)


class BiasNorm(nn.Module):
    """x / RMS(x - bias) * exp(log_scale), over the last dimension.

    The bias lets a channel carry a large constant that keeps length information;
    it enters the denominator only (Zipformer, eq. 3).

    Args:
        num_channels: size of the last dimension.
        count: given, training keeps ``log_scale`` within +-1.5.
    """

    def __init__(self, num_channels: int, count: BatchCount | None = None) -> None:
        super().__init__()
        self.count = count
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.empty(num_channels).normal_(std=1e-4))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., num_channels)."""
        log_scale = self.log_scale
        if self.training and self.count is not None:
            log_scale = limit_parameter(log_scale, -LOG_SCALE_LIMIT, LOG_SCALE_LIMIT)
        return _bias_norm(x, self.bias, log_scale)


class Bypass(nn.Module):
    """original + (x - original) * scale, with one learned scale per channel.

    Args:
        num_channels: size of the last dimension.
        count: given, training keeps the scale between ``BYPASS_MIN`` and 1.
        skip: with ``count``, share of sequences for which training returns
            ``original``.
    """

    def __init__(
        self,
        num_channels: int,
        count: BatchCount | None = None,
        skip: Scheduled = 0.0,
    ) -> None:
        super().__init__()
        self.count = count
        self.skip = skip
        self.bypass_scale = nn.Parameter(torch.full((num_channels,), 0.5))

    def forward(self, original: Tensor, x: Tensor) -> Tensor:
        """Combine two (B, ..., num_channels) tensors."""
        scale = self.bypass_scale
        if self.training and self.count is not None:
            scale = limit_parameter(scale, self.count.at(BYPASS_MIN), 1.0)
            skip = self.count.at(self.skip)
            if skip > 0.0:
                scale = scale * sequence_mask(x, skip)
        if original.dtype == x.dtype == scale.dtype:
            return torch.lerp(original, x, scale)
        return _interpolate(original, x, scale)  # under autocast


def scaled_linear(in_dim: int, out_dim: int, scale: float) -> nn.Linear:
    """nn.Linear whose initial weights are scaled down and whose bias is tiny.

    Residual branches that begin near zero let deep stacks train from the start.
    """
    linear = nn.Linear(in_dim, out_dim)
    with torch.no_grad():
        linear.weight.mul_(scale)
        linear.bias.uniform_(-0.1 * scale, 0.1 * scale)
    return linear

"""Activation and normalisation of the Zipformer (arXiv 2310.11230, 3.3 and 3.4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet2_spear.zipformer.fusion import fusible, replaceable
from espnet2_spear.zipformer.regularizers import limit_parameter, sequence_mask
from espnet2_spear.zipformer.schedule import BatchCount, Scheduled

BYPASS_MIN: Scheduled = ((0, 0.9), (20000, 0.2))
LOG_SCALE_LIMIT = 1.5


class Swoosh(NamedTuple):
    """softplus(x - shift) - 0.08 x - offset."""

    shift: float
    offset: float


SWOOSH_L = Swoosh(4.0, 0.035)  # Zipformer, eq. 5
SWOOSH_R = Swoosh(1.0, 0.313261687)  # eq. 4


@fusible
@replaceable
def swoosh_value(x: Tensor, kind: Swoosh) -> Tensor:
    """Compute swoosh without a gradient."""
    return torch.sub(F.softplus(x - kind.shift), x, alpha=0.08) - kind.offset


@fusible
def swoosh_gradient(x: Tensor, grad: Tensor, shift: float) -> Tensor:
    """Gradient with respect to x, given that of swoosh(x)."""
    return torch.sigmoid_(x - shift).sub_(0.08).mul_(grad)


class _Swoosh(torch.autograd.Function):
    """Keeps only x for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, kind: Swoosh) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind = kind
        return swoosh_value(x, kind)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return swoosh_gradient(x, grad, ctx.kind.shift), None


def swoosh(x: Tensor, kind: Swoosh) -> Tensor:
    """Return swoosh(x) of either kind."""
    if torch.compiler.is_compiling():
        return swoosh_value(x, kind)
    return _Swoosh.apply(x, kind)


def swoosh_l(x: Tensor) -> Tensor:
    """SwooshL(x) = log(1 + exp(x - 4)) - 0.08 x - 0.035 (Zipformer, eq. 5)."""
    return swoosh(x, SWOOSH_L)


def swoosh_r(x: Tensor) -> Tensor:
    """SwooshR(x) = log(1 + exp(x - 1)) - 0.08 x - 0.313261687 (Zipformer, eq. 4)."""
    return swoosh(x, SWOOSH_R)


class _BiasNorm(torch.autograd.Function):
    """x / RMS(x - bias) * exp(log_scale), keeping x and one number per frame."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor, log_scale: Tensor) -> Tensor:
        square = (x - bias).square_().mean(dim=-1, keepdim=True)
        scale = square.rsqrt() * log_scale.exp()
        ctx.save_for_backward(x, bias, square, scale)
        return x * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, bias, square, scale = ctx.saved_tensors
        product = (grad * x).sum(dim=-1, keepdim=True) * scale
        # d scale / d x = -scale (x - bias) / (square C)
        from_scale = (x - bias).mul_(product / (square * x.size(-1)))
        gx = torch.addcmul(-from_scale, grad, scale)
        return gx, from_scale.flatten(0, -2).sum(dim=0), product.sum()


@fusible
def _bias_norm(x: Tensor, bias: Tensor, log_scale: Tensor) -> Tensor:
    if x.dtype == bias.dtype and not torch.compiler.is_compiling():
        return _BiasNorm.apply(x, bias, log_scale)
    rms = (x - bias).square().mean(dim=-1, keepdim=True).rsqrt()
    return x * (rms * log_scale.exp())


@fusible
def _interpolate(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """torch.lerp of tensors of different dtypes."""
    return start + (end - start) * share


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
        log_scale: Tensor = self.log_scale
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
        scale: Tensor = self.bypass_scale
        if self.training and self.count is not None:
            scale = limit_parameter(scale, self.count.at(BYPASS_MIN), 1.0)
            skip = self.count.at(self.skip)
            if skip > 0.0:
                scale = scale * sequence_mask(x, skip)
        if original.dtype == x.dtype == scale.dtype:
            return torch.lerp(original, x, scale)
        return _interpolate(original, x, scale)  # under autocast


@replaceable
def linear(module: nn.Module, x: Tensor) -> Tensor:
    """Return module(x) of an nn.Linear or what took its place."""
    return module(x)


@replaceable
def swoosh_linear(
    module: nn.Module, x: Tensor, kind: Swoosh, keep: Tensor | None = None
) -> Tensor:
    """Return module(swoosh(x) * keep) of an nn.Linear or what took its place.

    Args:
        module: the linear map.
        x: (B, T, in); the caller must not need it any more, unless it needs a
            gradient.
        kind: SWOOSH_L or SWOOSH_R.
        keep: (B, 1, in), what dropout multiplies by; None: 1.
    """
    y = swoosh(x, kind)
    return module(y if keep is None else y * keep)


def scaled_linear(in_dim: int, out_dim: int, scale: float) -> nn.Linear:
    """nn.Linear whose initial weights are scaled down and whose bias is tiny.

    Residual branches that begin near zero let deep stacks train from the start.
    """
    linear = nn.Linear(in_dim, out_dim)
    with torch.no_grad():
        linear.weight.mul_(scale)
        linear.bias.uniform_(-0.1 * scale, 0.1 * scale)
    return linear

"""Regularisers of the Zipformer: balancers, whitening, dropout of channels.

The "activation constraints" of the Zipformer (arXiv 2310.11230, appendix A.3) with the
values of the published training code, as the public package zipformer 0.1.3 has them.
Everything here is the identity in eval mode, under ``torch.no_grad`` and where the
student was built without regularisers (``ZipformerConfig.regularize``).

Coins are flipped by the host, with Python's generator; what depends on a tensor's
values is decided on the tensor's device: no call waits for it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from espnet2_spear.zipformer.fusion import replaceable
from espnet2_spear.zipformer.schedule import BatchCount, Scheduled

BALANCER_PROB: Scheduled = ((0, 0.5), (8000, 0.125))
DROPOUT: Scheduled = ((0, 0.3), (20000, 0.1))
WHITEN_PROB = (0.025, 0.25)  # while within the limit, and beyond it
LIMIT_PROB = 0.6


def chance(prob: float) -> bool:
    """Flip a coin of Python's generator: no tensor that the host would have to read."""
    return random.random() < prob


def sequence_mask(x: Tensor, drop: float) -> Tensor:
    """1 for the sequences (first axis of x) that stay, 0 with probability ``drop``.

    Shape (B, 1, ...), as many axes as x. What stays is not scaled up.
    """
    shape = (x.size(0), *[1] * (x.dim() - 1))
    return (torch.rand(shape, device=x.device) >= drop).to(x.dtype)


class Limits(NamedTuple):
    """Ranges that a channel is balanced to: of mean / std and of RMS.

    Attributes:
        low_mean, high_mean, low_rms, high_rms: the ranges.
        grad_scale: size of the added gradient relative to the incoming one.
    """

    low_mean: float
    high_mean: float
    low_rms: float
    high_rms: float
    grad_scale: float


def balance_terms(
    var: Tensor, mean: Tensor, limits: Limits
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, slope and offset of each channel, for :func:`balance_gradient`.

    Args:
        var, mean: of each channel.
        limits: what they should be.
    """
    rms2 = (var + mean.square()).clamp_(min=1e-20)
    var = var.clamp(min=1e-20)
    std, rms = var.sqrt(), rms2.sqrt()
    m = mean / std
    sign_m = (m > limits.high_mean).float() - (m < limits.low_mean).float()
    sign_r = (rms > limits.high_rms).float() - (rms < limits.low_rms).float()
    # The gradient of |m - clamp(m)| + |log(clamp(rms) / rms)| with respect to x
    # is a positive multiple of offset + slope (x - mean) / std in each channel.
    offset = sign_m + sign_r * mean * std / rms2
    slope = sign_r * var / rms2 - sign_m * m
    size = (offset.square() + slope.square()).sqrt_().clamp_(min=1e-20)
    scale = limits.grad_scale / size
    return mean, slope * scale / std, offset * scale


def balance_gradient(
    grad: Tensor, x: Tensor, mean: Tensor, slope: Tensor, offset: Tensor
) -> Tensor:
    """Gradient that moves the channels of x into their limits, to be added to grad.

    The incoming gradient's magnitude says how large a term an element bears.
    """
    return (x - mean).mul_(slope).add_(offset).mul_(grad.abs())


class _Balance(torch.autograd.Function):
    """Identity whose gradient gets a term that moves channels into their limits."""

    @staticmethod
    def forward(ctx, x: Tensor, limits: Limits, channel_dim: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limits, ctx.channel_dim = limits, channel_dim
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        x = x.float()
        axes = [i for i in range(x.dim()) if i != ctx.channel_dim % x.dim()]
        # Not E x^2 - (E x)^2, where small deviations would drown.
        mean = x.mean(axes, keepdim=True)
        var = (x - mean).square_().mean(axes, keepdim=True)
        terms = balance_terms(var, mean, ctx.limits)
        added = balance_gradient(grad, x, *terms)
        return added.add_(grad).to(grad.dtype), None, None


def _mean_for_positive(share: float) -> float:
    """Mean / standard deviation at which this share of a channel is positive.

    The reference's approximation of the inverse error function.
    """
    y, eps = 2.0 * share - 1.0, 1e-10
    return 0.8139535143 * 0.5 * (math.log(1 + y + eps) - math.log(1 - y + eps))


class Balancer(nn.Module):
    """Keep each channel's share of positive values and mean magnitude in a range.

    Works on the gradient only: with a probability, the gradient of a penalty on
    mean / std and on log(RMS) is added, scaled to ``grad_scale`` (root mean square
    in each channel that is out of range) times the magnitude of each element's own
    gradient, so that it does not depend on the scale of the loss.

    Args:
        count: batch count of the schedules.
        min_positive: smallest share of positive values (of a normal distribution).
        max_positive: largest one.
        min_abs: smallest mean magnitude.
        max_abs: largest one.
        prob: probability that a call is balanced.
        grad_scale: size of the added term.
        channel_dim: the axis of channels.
    """

    def __init__(
        self,
        count: BatchCount,
        min_positive: Scheduled = 0.05,
        max_positive: Scheduled = 0.95,
        min_abs: Scheduled = 0.2,
        max_abs: Scheduled = 100.0,
        prob: Scheduled = BALANCER_PROB,
        grad_scale: float = 0.04,
        channel_dim: int = -1,
    ) -> None:
        super().__init__()
        self.count = count
        self.positive = (min_positive, max_positive)
        self.abs = (min_abs, max_abs)
        self.prob = prob
        self.grad_scale = grad_scale
        self.channel_dim = channel_dim

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        limits = self.draw() if x.requires_grad else None
        return x if limits is None else _Balance.apply(x, limits, self.channel_dim)

    def draw(self) -> Limits | None:
        """Limits of a call; None: it is not balanced."""
        at = self.count.at
        if not self.training or not chance(at(self.prob)):
            return None
        low, high = (_mean_for_positive(at(p)) for p in self.positive)
        # E|x| to RMS, of a normal distribution.
        small, large = (at(a) * math.sqrt(math.pi / 2) for a in self.abs)
        return Limits(low, high, small, large, self.grad_scale)


def whitening_metric(x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distance of the channels' covariance from a white one.

    Args:
        x: (..., C).
        groups: groups of channels, each with a covariance of its own.

    Returns:
        the metric, at least 1 (covariances equal one multiple of the identity);
        centred x (groups, N, C / groups); covariance sums (groups, c, c); their
        mean diagonal.
    """
    x = x.reshape(-1, groups, x.size(-1) // groups).transpose(0, 1)
    x = x - x.mean(dim=1, keepdim=True)
    covar = grouped_product(x.transpose(1, 2), x.transpose(1, 2))
    diagonal = covar.diagonal(dim1=1, dim2=2).mean()
    square = covar.square().sum() / (groups * covar.size(-1))
    return square / (diagonal.square() + 1e-20), x, covar, diagonal


@replaceable
def grouped_product(a: Tensor, b: Tensor) -> Tensor:
    """a (groups, n, k) times the transposes of b (groups, m, k)."""
    return torch.matmul(a, b.transpose(1, 2))


@replaceable
def whitening_gradient(
    x: Tensor,
    grad: Tensor,
    beyond: Tensor,
    coin: float,
    limit: float,
    groups: int,
    grad_scale: float,
) -> tuple[Tensor, Tensor]:
    """Add the metric's gradient where the coin says so and the metric is too large.

    Computed in any case and multiplied by 0 or 1, so that the host need not wait for
    the metric.

    Args:
        x: (..., C).
        grad: gradient of x.
        beyond: () bool, whether the last check found the metric beyond its limit.
        coin: in [0, 1).
        limit: largest metric that goes unpunished.
        groups, grad_scale: see :class:`Whiten`.

    Returns:
        the gradient, and ``beyond`` for the next call.
    """
    metric, centred, covar, diagonal = whitening_metric(x.float(), groups)
    # d metric / d x is a positive multiple of centred (covar - tr(C^2)/tr(C)).
    covar.diagonal(dim1=1, dim2=2).sub_(metric * diagonal)
    penalty = grouped_product(centred, covar)  # covar is symmetric
    del centred
    checked = coin < torch.where(beyond, WHITEN_PROB[1], WHITEN_PROB[0])
    above = metric > limit
    scale = grad_scale * grad.float().norm() / (penalty.norm() + 1e-20)
    scale = torch.where(checked & above, scale, 0.0)
    penalty = penalty.mul_(scale).transpose(0, 1).reshape(x.shape)
    return penalty.add_(grad).to(grad.dtype), torch.where(checked, above, beyond)


class _Whitening(torch.autograd.Function):
    """Identity whose gradient gets the gradient of the whitening metric."""

    @staticmethod
    def forward(ctx, x: Tensor, module: Whiten, coin: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module, ctx.coin = module, coin
        ctx.limit = module.count.at(module.limit)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,), module = ctx.saved_tensors, ctx.module
        with torch.autocast(x.device.type, enabled=False):
            grad, module.beyond = whitening_gradient(
                x,
                grad,
                module.beyond_on(x.device),
                ctx.coin,
                ctx.limit,
                module.groups,
                module.grad_scale,
            )
        return grad, None, None


class Whiten(nn.Module):
    """Push the covariance of channels towards a multiple of the identity.

    Works on the gradient only: where the metric of a call exceeds the limit, the
    metric's gradient is added, scaled to ``grad_scale`` times the norm of the
    incoming one. Calls are checked with probability 0.25 while the last check was
    beyond the limit, else 0.025.

    Args:
        count: batch count of the schedule.
        limit: largest metric that goes unpunished (1 is white).
        groups: groups of channels, each with a covariance of its own.
        grad_scale: size of the added gradient.

    Attributes:
        beyond: () bool, whether the last check was beyond the limit, on the device of
            the frames; None before the first check, which counts as beyond.
    """

    def __init__(
        self,
        count: BatchCount,
        limit: Scheduled,
        groups: int = 1,
        grad_scale: float = 0.01,
    ) -> None:
        super().__init__()
        self.count = count
        self.limit = limit
        self.groups = groups
        self.grad_scale = grad_scale
        self.beyond: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., C)."""
        if not self.training or not x.requires_grad:
            return x
        coin = random.random()
        # The device decides between the two probabilities.
        return _Whitening.apply(x, self, coin) if coin < WHITEN_PROB[1] else x

    def beyond_on(self, device: torch.device) -> Tensor:
        """Return ``beyond`` on a device."""
        if self.beyond is None:
            return torch.ones((), dtype=torch.bool, device=device)
        return self.beyond.to(device)

    @property
    def prob(self) -> float:
        """Probability of the next check, for checkpoints: the host waits for it."""
        return WHITEN_PROB[int(self.beyond is None or bool(self.beyond))]

    @prob.setter
    def prob(self, value: float) -> None:
        self.beyond = torch.tensor(value > WHITEN_PROB[0])


def whitening_limit(start: float, ratio: float = 2.0) -> Scheduled:
    """Limit that grows to ``ratio`` times its start over 20000 batches."""
    return ((0, start), (20000, ratio * start))


def _with_gradient(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return x; its gradient is changed on its way back."""
    if x.requires_grad:
        x = x.view_as(x)
        x.register_hook(change)
    return x


def scale_grad(x: Tensor, scale: float) -> Tensor:
    """Return x; its gradient is multiplied by ``scale``."""
    return _with_gradient(x, lambda grad: grad * scale)


def limit_parameter(p: Tensor, low: float, high: float) -> Tensor:
    """Return p; gradients that would move it further out of [low, high] change sign.

    Applied to 60 % of the calls, so that the loss keeps a say.
    """

    def turn(grad: Tensor) -> Tensor:
        away = ((grad > 0) & (p < low)) | ((grad < 0) & (p > high))
        return torch.where(away, -grad, grad)

    return _with_gradient(p, turn) if chance(LIMIT_PROB) else p


class _Penalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, limit: float, penalty: float) -> Tensor:
        # One byte per element instead of the scores themselves.
        beyond = (x > limit).to(torch.int8) - (x < -limit).to(torch.int8)
        ctx.save_for_backward(beyond)
        ctx.penalty = penalty
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (beyond,) = ctx.saved_tensors
        return grad + beyond * ctx.penalty, None, None


def penalize_large(x: Tensor, limit: float, penalty: float) -> Tensor:
    """Return x; the gradient of penalty * sum(max(|x| - limit, 0)) is added.

    The added gradient does not follow the scale of the loss: the caller multiplies
    ``penalty`` by what the loss is multiplied by (:attr:`BatchCount.loss_scale`).
    """
    return _Penalize.apply(x, limit, penalty)


class SharedDropout(nn.Module):
    """Dropout of whole channels: one draw for all frames of an utterance.

    Args:
        count: batch count of the schedule; None: nothing is dropped.
    """

    def __init__(self, count: BatchCount | None) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        """Drop channels of x (B, T, C) and scale the others up."""
        keep = self.draw(x)
        return x if keep is None else x * keep

    def draw(self, x: Tensor) -> Tensor | None:
        """Draw factors (B, 1, C) of x (B, T, C); None: nothing drops."""
        if self.count is None or not self.training:
            return None
        rate = self.count.at(DROPOUT)
        keep = torch.rand(x.size(0), 1, x.size(-1), device=x.device) >= rate
        return keep.to(x.dtype) / (1.0 - rate)


def balancer(count: BatchCount | None, **limits) -> nn.Module:
    """Return a Balancer, or the identity for a student without regularisers."""
    return nn.Identity() if count is None else Balancer(count, **limits)


def whiten(count: BatchCount | None, limit: Scheduled, **options) -> nn.Module:
    """Return a Whiten, or the identity for a student without regularisers."""
    return nn.Identity() if count is None else Whiten(count, limit, **options)

"""Linear maps, and activations before them, fast and small on a CPU.

See :mod:`.products`; under torch.compile everything is PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet2_spear.zipformer.products import has_onednn, matmul_t, weight_product
from espnet2_spear.zipformer.regularizers import (
    Limits,
    balance_gradient,
    balance_terms,
)
from espnet2_spear.zipformer.scaling import (
    SWOOSH_L,
    SWOOSH_R,
    Swoosh,
    swoosh,
    swoosh_,
    swoosh_gradient,
    swoosh_value,
)

ROWS = 1024  # of a block that a chain of operations is done for at once


def on_cpu(x: Tensor, *modules: nn.Module) -> bool:
    """Whether x and plain layers can take the short ways of a CPU.

    A layer with hooks, or that was replaced (LoRA, quantization), is called as it is.
    """
    if not has_onednn(x):
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return all(
        type(m) in (nn.Linear, nn.Conv2d)
        and m.weight.dtype == torch.float32
        and not (m._forward_hooks or m._forward_pre_hooks)
        for m in modules
    )


class _LinearMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = matmul_t(x.reshape(-1, x.size(-1)), weight, bias)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        want_x, want_weight, want_bias = ctx.needs_input_grad
        g = grad.reshape(-1, grad.size(-1))
        gx = matmul_t(g, weight.t()).view(x.shape) if want_x else None
        gw = weight_product(g, x.reshape(-1, x.size(-1))) if want_weight else None
        return gx, gw, g.sum(dim=0) if want_bias else None


def linear_map(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) times the transpose of weight (out, in), plus bias; see on_cpu."""
    return _LinearMap.apply(x, weight, bias)


def apply_linear(module: nn.Module, x: Tensor) -> Tensor:
    """Return module(x) of an nn.Linear or what took its place."""
    if x.numel() and on_cpu(x, module):
        return linear_map(x, module.weight, module.bias)
    return module(x)


class _SwooshLinear(torch.autograd.Function):
    """linear(swoosh(x) * keep); the activation is computed again in the backward pass.

    So only x is kept, not what the linear map reads as well.
    """

    @staticmethod
    def forward(ctx, x, keep, weight, bias, kind: Swoosh) -> Tensor:
        ctx.save_for_backward(x, keep, weight)
        ctx.kind = kind
        y = swoosh_value(x, kind)
        if keep is not None:
            y.mul_(keep)
        y = matmul_t(y.view(-1, y.size(-1)), weight, bias)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, keep, weight = ctx.saved_tensors
        g = grad.reshape(-1, grad.size(-1))
        y = swoosh_value(x, ctx.kind)
        if keep is not None:
            y.mul_(keep)
        gw = weight_product(g, y.view(-1, y.size(-1)))
        del y
        gx = matmul_t(g, weight.t()).view(x.shape)
        gx = swoosh_gradient(x, gx, ctx.kind.shift)
        if keep is not None:
            gx.mul_(keep)
        return gx, None, gw, g.sum(dim=0) if ctx.needs_input_grad[3] else None, None


def swoosh_linear(
    module: nn.Module, x: Tensor, kind: Swoosh, keep: Tensor | None = None
) -> Tensor:
    """Return module(swoosh(x) * keep) of an nn.Linear or what took its place.

    Args:
        module: the linear map.
        x: (B, T, in). Without gradients its memory is used for the result of swoosh:
            the caller must not need it any more.
        kind: SWOOSH_L or SWOOSH_R.
        keep: (B, 1, in), what dropout multiplies by.
    """
    if x.numel() and on_cpu(x, module):
        if torch.is_grad_enabled():
            x = x.contiguous()
            return _SwooshLinear.apply(x, keep, module.weight, module.bias, kind)
        x = swoosh_(x, kind)
        return apply_linear(module, x if keep is None else x.mul_(keep))
    y = swoosh(x, kind)
    return module(y if keep is None else y * keep)


class _SwooshConv(torch.autograd.Function):
    """conv(swoosh(x)), which keeps x only, as _SwooshLinear does."""

    @staticmethod
    def forward(ctx, x: Tensor, conv: nn.Conv2d, weight: Tensor, bias: Tensor):
        ctx.save_for_backward(x, weight)
        ctx.conv = conv
        y = swoosh_value(x, SWOOSH_R)
        return F.conv2d(y, weight, bias, conv.stride, conv.padding, 1, conv.groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        conv = ctx.conv
        gx, gw, _ = torch.ops.aten.convolution_backward(
            grad,
            swoosh_value(x, SWOOSH_R),
            weight,
            [len(weight)],
            conv.stride,
            conv.padding,
            [1, 1],
            False,
            [0, 0],
            conv.groups,
            [True, ctx.needs_input_grad[2], False],
        )
        if gw is not None:
            gw = gw.flatten(1).view(weight.shape)  # laid out as DDP asks for
        # oneDNN takes four times as long for the sum.
        gb = grad.sum(dim=(0, 2, 3)) if ctx.needs_input_grad[3] else None
        return swoosh_gradient(x, gx, SWOOSH_R.shift), None, gw, gb


def swoosh_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return conv(swoosh_r(x)) for x that ``on_cpu`` holds for."""
    return _SwooshConv.apply(x, conv, conv.weight, conv.bias)


def _pair(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:
    """linear(swoosh_l(linear(x))) of x (n, in), block by block."""
    y = x.new_empty(len(x), len(weight2))
    for part, out in zip(x.split(ROWS), y.split(ROWS), strict=True):
        hidden = swoosh_(matmul_t(part, weight1, bias1), SWOOSH_L)
        out.copy_(matmul_t(hidden, weight2, bias2))
    return y


def linear_pair(first: nn.Linear, second: nn.Linear, x: Tensor) -> Tensor:
    """Return second(swoosh_l(first(x))) without gradients, as ``on_cpu`` allows.

    Of what lies between the two, no more than a block exists.
    """
    rows = x.reshape(-1, x.size(-1))
    y = _pair(rows, first.weight, first.bias, second.weight, second.bias)
    return y.view(*x.shape[:-1], -1)


class _Pointwise(torch.autograd.Function):
    """linear(swoosh(linear(x))) block by block; the wide middle is computed twice.

    The middle of the embedding's ConvNeXt block, (B, 384, T, 31), is by far the largest
    tensor of the network. Computed again in the backward pass, it is never kept, and
    a block of it never leaves the cache.
    """

    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, limits) -> Tensor:
        ctx.save_for_backward(x, weight1, bias1, weight2)
        ctx.limits = limits
        return _pair(x, weight1, bias1, weight2, bias2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, bias1, weight2 = ctx.saved_tensors
        grad = grad.contiguous()
        terms = None
        if ctx.limits is not None:
            hidden = (matmul_t(part, weight1, bias1) for part in x.split(ROWS))
            terms = balance_terms(*_var_mean(hidden), ctx.limits)
        gx = torch.empty_like(x)
        gw1, gw2 = torch.zeros_like(weight1), torch.zeros_like(weight2)
        gb1 = torch.zeros_like(bias1)
        for part, g, out in zip(
            x.split(ROWS), grad.split(ROWS), gx.split(ROWS), strict=True
        ):
            hidden = matmul_t(part, weight1, bias1)
            gw2 += weight_product(g, swoosh_value(hidden, SWOOSH_L))
            gh = matmul_t(g, weight2.t())
            gh = swoosh_gradient(hidden, gh, SWOOSH_L.shift)
            if terms is not None:
                gh += balance_gradient(gh, hidden, *terms)
            gw1 += weight_product(gh, part)
            gb1 += gh.sum(dim=0)
            out.copy_(matmul_t(gh, weight1.t()))
        return gx, gw1, gb1, gw2, grad.sum(dim=0), None


def _var_mean(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Variance and mean (1, C) of the rows of all parts (n, C)."""
    count, mean, square = 0, torch.zeros(()), torch.zeros(())
    for part in parts:
        n = len(part)
        var, new = torch.var_mean(part, dim=0, correction=0, keepdim=True)
        step = new - mean
        total = count + n
        square = square + n * var + step.square() * (count * n / total)
        mean = mean + step * (n / total)
        count = total
    return square / count, mean


def pointwise_pair(
    first: nn.Conv2d, second: nn.Conv2d, x: Tensor, limits: Limits | None
) -> Tensor:
    """Return second(swoosh_l(balanced(first(x)))) of 1 x 1 convolutions.

    Args:
        first, second: the convolutions.
        x: (B, C, T, F), channels last in memory, which ``on_cpu`` holds for.
        limits: what the middle is balanced to; None: it is not.
    """
    rows = x.permute(0, 2, 3, 1)
    weights = [(m.weight.flatten(1), m.bias) for m in (first, second)]
    y = _Pointwise.apply(
        rows.reshape(-1, rows.size(-1)), *weights[0], *weights[1], limits
    )
    return y.view(*rows.shape[:-1], -1).permute(0, 3, 1, 2)

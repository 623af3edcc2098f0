"""The network's functions on a CPU: the same results, up to twice as fast.

The network itself is plain PyTorch; :data:`VERSIONS`, at the end, says which of its
functions are replaced for float32 tensors in a CPU's memory, and what makes each
faster. Where the conditions of :func:`.fusion.replaceable` do not hold, or a version
returns NotImplemented, the plain function runs: on GPUs, under autocast, in graphs.

Products: PyTorch multiplies float32 matrices by MKL, which takes less than half the
width of the vector units of CPUs that are not Intel's. oneDNN, a part of PyTorch too,
does not ask who made the CPU: on an AMD one with AVX-512 a product is 2.2 times as
fast, the same on any number of threads (benchmarks/README.md). It is used on CPUs with
AVX-512.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet2_spear.torch_private import has_hooks, onednn_linear
from espnet2_spear.zipformer.conv_embed import conv2d
from espnet2_spear.zipformer.fbank import log_mel
from espnet2_spear.zipformer.fusion import cpu_versions
from espnet2_spear.zipformer.regularizers import (
    WHITEN_PROB,
    Balancer,
    Limits,
    balance_gradient,
    balance_terms,
)
from espnet2_spear.zipformer.scaling import (
    SWOOSH_L,
    SWOOSH_R,
    Swoosh,
    swoosh_gradient,
    swoosh_value,
)
from espnet2_spear.zipformer.scores import (
    MASKED_SCORE,
    SCORE_LIMIT,
    Inputs,
    relative_to_absolute,
)

# What is computed at once, so that it stays in the caches: rows of a chain of
# operations, fbank frames, attention weights of a head.
ROWS, FBANK_FRAMES, HEAD_WEIGHTS, HEAD_QUERIES = 1024, 128, 2**19, 8
# Weights of a head from which on it is faster to hold none (benchmarks/README.md).
MAX_HEAD_WEIGHTS = 2**17


def _has_onednn() -> bool:
    wide = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return wide and torch.backends.mkldnn.is_available()


ONEDNN = _has_onednn()


# ------------------------------------------------------------
# Products of matrices by oneDNN.


def matmul_t(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (n, k) times the transpose of b (m, k), plus bias (m,); by oneDNN."""
    if not (b.is_contiguous() or b.t().is_contiguous()):
        # Part of a larger matrix, such as rows of one utterance whose channels come
        # first in memory: oneDNN has only reference code for it, far slower.
        b = b.contiguous()
    return onednn_linear(a, b, bias, "none", [], "")


def weight_product(g: Tensor, x: Tensor) -> Tensor:
    """Transpose of g (n, out) times x (n, in): (out, in); by oneDNN.

    oneDNN copies the transposed one of its operands: here the narrower of the two.
    """
    if g.size(1) > x.size(1):
        return matmul_t(x.t(), g.t()).t()
    return matmul_t(g.t(), x.t())


def product_t(a: Tensor, b: Tensor) -> Tensor:
    """a (n, k) times the transpose of b (m, k), by the faster library."""
    return matmul_t(a, b) if ONEDNN else torch.mm(a, b.t())


def cpu_grouped_product(a: Tensor, b: Tensor) -> Tensor:
    """Version of ``grouped_product``."""
    if len(a) != 1 or not ONEDNN:
        return NotImplemented
    return product_t(a[0], b[0])[None]


def _plain_layers(*modules: nn.Module) -> bool:
    """Whether oneDNN computes these layers.

    A layer with hooks, or that was replaced (LoRA, quantization), is called as it is.
    """
    return ONEDNN and all(
        type(m) in (nn.Linear, nn.Conv2d)
        and m.weight.dtype == torch.float32
        and not has_hooks(m)
        for m in modules
    )


# ------------------------------------------------------------
# Linear maps, and activations before them.


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


def cpu_linear(module: nn.Module, x: Tensor) -> Tensor:
    """Version of ``linear``."""
    if not x.numel() or not _plain_layers(module):
        return NotImplemented
    return _LinearMap.apply(x, module.weight, module.bias)


def cpu_project(layer: nn.Linear, x: Tensor) -> Tensor:
    """Version of ``project``: reorders the weight, not the much larger features."""
    if not _plain_layers(layer):
        return NotImplemented
    weight = layer.weight.unflatten(1, (x.size(1), -1)).transpose(1, 2).flatten(1)
    return _LinearMap.apply(x.permute(0, 2, 3, 1).flatten(2), weight, layer.bias)


def _softplus_(x: Tensor) -> Tensor:
    return torch.ops.aten.softplus.out(x, 1.0, 20.0, out=x)


def cpu_swoosh_value(x: Tensor, kind: Swoosh) -> Tensor:
    """Version of ``swoosh_value``: one temporary tensor, which is the result."""
    y = _softplus_(x - kind.shift)
    return y.add_(x, alpha=-0.08).sub_(kind.offset)


def swoosh_(x: Tensor, kind: Swoosh) -> Tensor:
    """Compute swoosh in place, without a gradient."""
    y = _softplus_(x - kind.shift)
    return x.mul_(-0.08).add_(y).sub_(kind.offset)


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


def cpu_swoosh_linear(
    module: nn.Module, x: Tensor, kind: Swoosh, keep: Tensor | None = None
) -> Tensor:
    """Version of ``swoosh_linear``; without gradients it overwrites x."""
    if not x.numel() or not _plain_layers(module):
        return NotImplemented
    if torch.is_grad_enabled():
        x = x.contiguous()
        return _SwooshLinear.apply(x, keep, module.weight, module.bias, kind)
    x = swoosh_(x, kind)
    return cpu_linear(module, x if keep is None else x.mul_(keep))


class _SwooshConv(torch.autograd.Function):
    """conv(swoosh_r(x)), which keeps x only, as _SwooshLinear does."""

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


def cpu_swoosh_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Version of ``swoosh_conv``; without gradients it overwrites x."""
    if not torch.is_grad_enabled():
        return conv2d(conv, swoosh_(x, SWOOSH_R))
    if not _plain_layers(conv):
        return NotImplemented
    return _SwooshConv.apply(x, conv, conv.weight, conv.bias)


# ------------------------------------------------------------
# Two linear maps with an activation between them, block by block.


def _pair(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:
    """linear(swoosh_l(linear(x))) of x (n, in); of the middle a block exists."""
    y = x.new_empty(len(x), len(weight2))
    for part, out in zip(x.split(ROWS), y.split(ROWS), strict=True):
        hidden = swoosh_(matmul_t(part, weight1, bias1), SWOOSH_L)
        out.copy_(matmul_t(hidden, weight2, bias2))
    return y


def cpu_feed_forward(module: Any, x: Tensor) -> Tensor:
    """Version of ``feed_forward`` without gradients."""
    first, second = module.in_proj, module.out_proj
    if torch.is_grad_enabled() or module.training or not x.numel():
        return NotImplemented
    if not _plain_layers(first, second):
        return NotImplemented
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
            parts = (matmul_t(part, weight1, bias1) for part in x.split(ROWS))
            terms = balance_terms(*_var_mean(parts), ctx.limits)
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


def cpu_pointwise(module: Any, x: Tensor) -> Tensor:
    """Version of ``pointwise``, for x that is channels last in memory."""
    first, second = module.pointwise_conv1, module.pointwise_conv2
    if not _plain_layers(first, second):
        return NotImplemented
    limits: Limits | None = None
    if isinstance(module.balance_hidden, Balancer) and x.requires_grad:
        limits = module.balance_hidden.draw()
    rows = x.permute(0, 2, 3, 1)
    weights = [(m.weight.flatten(1), m.bias) for m in (first, second)]
    y = _Pointwise.apply(
        rows.reshape(-1, rows.size(-1)), *weights[0], *weights[1], limits
    )
    return y.view(*rows.shape[:-1], -1).permute(0, 3, 1, 2)


# ------------------------------------------------------------
# Convolution over time, fbank, whitening.


def cpu_depthwise(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """Version of ``depthwise``.

    (B, T, dim) is what a 2-D image of dim channels looks like in memory, channels last,
    whose convolution needs no copy. Without gradients frames are its columns, which is
    4 times as fast as rows; their backward pass is far slower.
    """
    axis = 1 if torch.is_grad_enabled() or not ONEDNN else 2  # of frames, in the image
    image = x.unsqueeze(3 - axis).permute(0, 3, 1, 2)
    # Its gradient then lies in memory as it does, which DDP asks for.
    weight = conv.weight.squeeze(1)[:, None].unsqueeze(4 - axis)
    around = int(conv.padding[0])
    padding = (around, 0) if axis == 1 else (0, around)
    y = F.conv2d(image, weight, conv.bias, padding=padding, groups=conv.groups)
    return y.permute(0, 2, 3, 1).squeeze(3 - axis)


def cpu_log_mel(x: Tensor, window: Tensor, mel: Tensor) -> Tensor:
    """Version of ``log_mel``: so many frames at once that they stay in the caches."""
    size = max(1, FBANK_FRAMES // len(x))
    if x.size(1) <= size:
        return NotImplemented
    parts = [log_mel(part, window, mel) for part in x.split(size, dim=1)]
    return torch.cat(parts, dim=1)


def cpu_whitening_gradient(
    x: Tensor, grad: Tensor, beyond: Tensor, coin: float, *options: Any
) -> tuple[Tensor, Tensor]:
    """Version of ``whitening_gradient``: a CPU may look before it computes."""
    if coin >= WHITEN_PROB[int(beyond)]:
        return grad, beyond
    return NotImplemented


# ------------------------------------------------------------
# Attention of one head and one block of queries at a time. From some hundred frames
# on, a block in the caches is faster than all weights in memory.


@dataclass(frozen=True)
class _Head:
    """One head of one utterance; as :class:`Inputs`.

    Attributes:
        q: (T, d).
        k: (S, d).
        p: (T, d') or None.
        r: (d', T + S - 1) or None.
        padding: (S,) bool; None: no key is padding.
        frames: keys before the first one that is padding.
        seen: (T, 2) or None.
    """

    q: Tensor
    k: Tensor
    p: Tensor | None
    r: Tensor | None
    padding: Tensor | None
    frames: int
    seen: Tensor | None

    def blocks(self, whole: bool = False) -> Iterator[tuple[slice, slice]]:
        """Queries, and the keys that any of them sees; ``whole``: all keys."""
        t, s = len(self.q), len(self.k)
        size = HEAD_WEIGHTS // s
        if self.seen is not None and not whole:
            widest = int((self.seen[:, 1] - self.seen[:, 0]).max())
            size = min(HEAD_WEIGHTS // widest, widest)
        size = max(HEAD_QUERIES, size)
        for start in range(0, t, size):
            end, keys = min(start + size, t), slice(0, s)
            # A query in the padding may see no key, and then weighs all alike.
            if self.seen is not None and not whole and end <= self.frames:
                seen = self.seen[start:end]
                keys = slice(int(seen[:, 0].min()), min(s, int(seen[:, 1].max())))
            yield slice(start, end), keys

    def positions(self, r: Tensor, rows: slice, keys: slice) -> Tensor:
        """Positional keys (d', queries + keys - 1) of a block, of r (d', T + S - 1)."""
        t = len(self.q)
        return r[:, t - rows.stop + keys.start : t - rows.start + keys.stop - 1]

    def scores(self, rows: slice, keys: slice) -> Tensor:
        """Scores (queries, keys) of a block, before masks."""
        scores = product_t(self.q[rows], self.k[keys])
        if self.p is None or self.r is None:
            return scores
        by_offset = self.p[rows] @ self.positions(self.r, rows, keys)
        return scores.add_(relative_to_absolute(by_offset, scores.size(1)))

    def masks(self, rows: slice, keys: slice) -> list[Tensor]:
        """Masks of a block."""
        masks = [] if self.padding is None else [self.padding[keys]]
        if self.seen is not None:
            key = torch.arange(keys.start, keys.stop)
            begin, behind = self.seen[rows, None].unbind(-1)
            masks.append((key < begin) | (key >= behind))
        return masks

    def weights(self, rows: slice, keys: slice) -> Tensor:
        """Weights (queries, keys) of a block."""
        scores = self.scores(rows, keys)
        for mask in self.masks(rows, keys):
            scores.masked_fill_(mask, MASKED_SCORE)
        return torch.softmax(scores, dim=-1, out=scores)


def _heads(inputs: Inputs) -> Iterator[tuple[int, int, _Head]]:
    """Utterance, head, and what its weights are computed from."""
    q, k, p, r, padding, seen = inputs
    for b, mask in enumerate(padding):
        frames = int((~mask).sum())
        for h in range(q.size(1)):
            head = _Head(
                q[b, h].contiguous(),
                k[b, h].contiguous(),
                None if p is None else p[b, h].contiguous(),
                None if r is None else r[h].contiguous(),
                mask if frames < len(mask) else None,
                frames,
                seen,
            )
            yield b, h, head


class _ApplyInBlocks(torch.autograd.Function):
    """Weighted sums; the backward pass computes the weights again."""

    @staticmethod
    def forward(ctx, v: Tensor, penalty: float, *inputs: Any) -> Tensor:
        ctx.save_for_backward(v, *inputs)
        ctx.penalty = penalty
        given = Inputs(*inputs)
        out = v.new_empty(*v.shape[:2], given.q.size(2), v.size(3))
        for b, h, head in _heads(given):
            values = v[b, h].t().contiguous()
            for rows, keys in head.blocks():
                # oneDNN is many times slower on a part of longer rows.
                part = values[:, keys].contiguous()
                out[b, h, rows] = product_t(head.weights(rows, keys), part)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, *tensors = ctx.saved_tensors
        inputs = Inputs(*tensors)
        gv = torch.empty_like(v)
        gq, gk = torch.zeros_like(inputs.q), torch.zeros_like(inputs.k)
        gp, gr = (None if x is None else torch.zeros_like(x) for x in inputs[2:4])
        for b, h, head in _heads(inputs):
            g, values = grad[b, h].contiguous(), v[b, h].contiguous()
            found: tuple[Any, ...] = _head_backward(head, g, values, ctx.penalty)
            gv[b, h], gq[b, h], gk[b, h], of_p, of_r = found
            if gp is not None and gr is not None:
                gp[b, h] = of_p
                gr[h] += of_r
        return gv, None, gq, gk, gp, gr, None, None


def _head_backward(
    head: _Head, g: Tensor, v: Tensor, penalty: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of v, q, k, p and r of a head.

    Args:
        head: it.
        g: (T, d) gradient of the result.
        v: (S, d) values.
        penalty: gradient that shrinks large scores; 0: none.
    """
    gv, gq, gk = torch.zeros_like(v.t()), torch.empty_like(head.q), head.k.t()
    turned_k, gk, turned_g = gk.contiguous(), torch.zeros_like(gk), g.t().contiguous()
    gp = None if head.p is None else torch.empty_like(head.p)
    gr = None if head.r is None else torch.zeros_like(head.r)
    around = None
    for rows, keys in head.blocks(whole=penalty > 0):
        weights = head.weights(rows, keys)
        gv[:, keys] += product_t(turned_g[:, rows].contiguous(), weights.t())
        part = product_t(g[rows], v[keys])
        part.mul_(weights)  # the gradient of softmax
        part.addcmul_(weights, part.sum(dim=1, keepdim=True), value=-1)
        del weights
        for mask in head.masks(rows, keys):
            part.masked_fill_(mask, 0.0)
        if penalty:
            scores = head.scores(rows, keys)
            part.add_(scores > SCORE_LIMIT, alpha=penalty)
            part.add_(scores < -SCORE_LIMIT, alpha=-penalty)
        gq[rows] = product_t(part, turned_k[:, keys].contiguous())
        gk[:, keys] += product_t(head.q[rows].t(), part.t())
        if head.p is None or head.r is None or gp is None or gr is None:
            continue
        n, s = part.shape
        if around is None or around.shape != (n, n + s - 1):
            around = part.new_zeros(n, n + s - 1)
        relative_to_absolute(around, s).copy_(part)  # around it stay zeros
        positions = head.positions(head.r, rows, keys)
        gp[rows] = around @ positions.t()  # oneDNN is slow at four columns
        first = len(head.q) - rows.stop + keys.start
        gr[:, first : first + n + s - 1] += head.p[rows].t() @ around
    return gv.t(), gq, gk.t(), gp, gr


def cpu_in_blocks(q: Tensor, k: Tensor) -> bool:
    """Version of ``in_blocks``."""
    return q.size(2) * k.size(2) >= MAX_HEAD_WEIGHTS


def cpu_apply_in_blocks(v: Tensor, inputs: Inputs, penalty: float) -> Tensor:
    """Version of ``apply_in_blocks``."""
    return _ApplyInBlocks.apply(v, penalty, *inputs)


# ------------------------------------------------------------
# Function of the network -> its version here; what it gains.
VERSIONS: dict[str, Callable[..., Any]] = {
    "linear": cpu_linear,  # oneDNN
    "project": cpu_project,  # oneDNN, features stay where they are
    "grouped_product": cpu_grouped_product,  # oneDNN
    "swoosh_value": cpu_swoosh_value,  # fewer temporary tensors
    "swoosh_linear": cpu_swoosh_linear,  # oneDNN, half of the memory
    "swoosh_conv": cpu_swoosh_conv,  # half of the memory, a faster sum for the bias
    "feed_forward": cpu_feed_forward,  # oneDNN, the middle stays in the caches
    "pointwise": cpu_pointwise,  # oneDNN, the middle stays in the caches
    "depthwise": cpu_depthwise,  # no copies, a faster convolution
    "log_mel": cpu_log_mel,  # spectra stay in the caches
    "whitening_gradient": cpu_whitening_gradient,  # most of it is not computed
    "in_blocks": cpu_in_blocks,  # already for shorter utterances
    "apply_in_blocks": cpu_apply_in_blocks,  # a head's block stays in the caches
}


def use_cpu_versions(on: bool = True) -> None:
    """Let CPUs run these versions in this process; False: the plain functions."""
    cpu_versions.clear()
    if on:
        cpu_versions.update(VERSIONS)

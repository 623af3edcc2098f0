"""Products of float32 matrices on a CPU, at the width of its vector units.

PyTorch multiplies float32 matrices by MKL, which takes less than half the width of the
vector units of CPUs that are not Intel's. oneDNN, a part of PyTorch too, does not ask
who made the CPU: on an AMD one with AVX-512 a product is 2.2 times as fast, the same on
any number of threads (benchmarks/README.md). It is used for float32 on a CPU with
AVX-512 only; elsewhere the products are PyTorch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _built_for_onednn() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    )


ONEDNN = _built_for_onednn()


def has_onednn(x: Tensor) -> bool:
    """Whether oneDNN multiplies matrices such as x: float32, on such a CPU."""
    return ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32


def matmul_t(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (n, k) times the transpose of b (m, k), plus bias (m,); by oneDNN."""
    if not (b.is_contiguous() or b.t().is_contiguous()):
        # Part of a larger matrix, such as rows of one utterance whose channels come
        # first in memory: oneDNN has only reference code for it, far slower.
        b = b.contiguous()
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def weight_product(g: Tensor, x: Tensor) -> Tensor:
    """Transpose of g (n, out) times x (n, in): (out, in); by oneDNN.

    oneDNN copies the transposed one of its operands: here the narrower of the two.
    """
    if g.size(1) > x.size(1):
        return matmul_t(x.t(), g.t()).t()
    return matmul_t(g.t(), x.t())


def product_t(a: Tensor, b: Tensor) -> Tensor:
    """a (n, k) times the transpose of b (m, k), without a gradient."""
    if has_onednn(a):
        return matmul_t(a, b)
    return torch.mm(a, b.t())

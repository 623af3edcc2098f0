"""Names that torch does not promise to keep, and public torch in place of each.

No other file of the package uses a private name of torch. Where a version of torch
lacks one, what stands in gives the same results, but for :data:`TorchDispatchMode`,
which nothing public replaces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------
# One call, and on a GPU few kernels, for many tensors.


def plain_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Euclidean norms, scalars."""
    return [torch.linalg.vector_norm(x) for x in tensors]


def plain_copy_(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Copy each of the others into its tensor."""
    for x, other in zip(tensors, others, strict=True):
        x.copy_(other)


def plain_mul_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply each tensor in place by one scalar."""
    for x in tensors:
        x.mul_(factor)


# get_total_norm is public, but adds the norms up.
foreach_norm = getattr(torch, "_foreach_norm", plain_norms)
# An update of the parameters would be one kernel a tensor.
foreach_copy_ = getattr(torch, "_foreach_copy_", plain_copy_)
# clip_grads_with_norm_ is public, but its factor is another one.
foreach_mul_ = getattr(torch, "_foreach_mul_", plain_mul_)

# ------------------------------------------------------------
# Layers on a CPU.


def plain_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *unused: Any
) -> Tensor:
    """Linear map by whichever library torch chooses."""
    return F.linear(x, weight, bias)


# Public torch takes oneDNN for float32 only with tensors in oneDNN's own layout.
onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", plain_linear)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its forward, as far as is known."""
    # Public torch adds hooks, and does not tell of them.
    names = ("_forward_hooks", "_forward_pre_hooks")
    return any(getattr(module, name, True) for name in names)


def version(tensor: Tensor) -> object:
    """Something that is another one after the tensor was changed in place."""
    # Public torch would have to compare all values.
    return getattr(tensor, "_version", object())


# ------------------------------------------------------------
# Steps without values, and operations as they happen.

try:
    # A public device without memory is "meta", on which autocast does nothing.
    from torch._subclasses import FakeTensorMode
except ImportError:
    FakeTensorMode = None

try:
    # The public modes are told of calls, not of a backward pass' operations.
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError:
    TorchDispatchMode = object  # which tells of nothing: ask before use


def fake_tensors() -> contextlib.AbstractContextManager:
    """Let new tensors have no memory; or else be real ones, of the same sizes."""
    if FakeTensorMode is None:
        return contextlib.nullcontext()
    return FakeTensorMode(allow_non_fake_inputs=True)


# ------------------------------------------------------------
# Graphs.

try:
    from torch.fx.experimental import _config as fx_config
except ImportError:
    fx_config = None

# Tells an exported graph's assertions about sizes from its operations.
_ASSERTION = getattr(torch.ops.aten, "_assert_scalar", None)
ASSERTIONS = set() if _ASSERTION is None else {_ASSERTION.default}


def ones_are_sizes(on: bool) -> contextlib.AbstractContextManager:
    """Let torch.export take a size of 1 for one of many, where it can."""
    # What is public makes a size dynamic, and still its 1 a case of its own.
    if fx_config is None or not hasattr(fx_config, "backed_size_oblivious"):
        return contextlib.nullcontext()
    return fx_config.patch(backed_size_oblivious=on)


def allow_graphs(count: int) -> None:
    """Let torch.compile make so many graphs of a function before it gives up."""
    # torch.compiler.config has this since lately. Without it the function runs as it is
    # from torch's own limit on.
    with contextlib.suppress(AttributeError):
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, count)

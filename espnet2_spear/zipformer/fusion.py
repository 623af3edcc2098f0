"""Faster versions of the network's functions: compiled, or a CPU's own.

The network is written in plain PyTorch. Two decorators say which of its functions may
be run in another way with the same result:

- ``fusible``: a chain of element-wise operations that torch.compile can make one
  kernel, by option (:func:`fuse_chains`). Layers as a whole are not compiled: in
  training, what they skip and how much they drop changes from call to call, and a
  graph would be made anew each time. The chains have no such choices in them; a few
  graphs serve batches of all shapes.
- ``replaceable``: a function that has another version for float32 on a CPU, in the
  table of :mod:`.cpu`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from espnet2_spear.torch_private import allow_graphs

Chain = Callable[..., Tensor]

# Graphs of one chain: dtypes, layouts, ranks, and batches of a lone utterance.
_MAX_GRAPHS = 32

_compiled: dict[Chain, Chain] = {}
_switch = {"on": False}
# Name of a function of the network -> its version for a CPU, see cpu.py.
cpu_versions: dict[str, Callable[..., Any]] = {}


def fusible(chain: Chain) -> Chain:
    """Decorate a function of tensors that has no side effects and draws nothing."""

    @functools.wraps(chain)
    def call(*args: Tensor | float) -> Tensor:
        if not _switch["on"]:
            return chain(*args)
        if chain not in _compiled:
            _compiled[chain] = torch.compile(chain, dynamic=True)
        return _compiled[chain](*args)

    return call


def fuse_chains(on: bool = True) -> bool:
    """Let all chains of this process be compiled, if there is a compiler.

    The first steps take longer, while graphs are made.

    Args:
        on: False goes back to plain operations.

    Returns:
        whether chains are compiled from now on; a warning says why if they cannot be.
    """
    _switch["on"] = False
    if on:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        allow_graphs(_MAX_GRAPHS)
        try:
            x = torch.ones(16, device=device)
            torch.compile(lambda x: x.sigmoid() * 2 - x, dynamic=True)(x)
        except Exception as error:
            logging.warning(
                "torch.compile does not work here, the training goes on without: it "
                "needs a C++ compiler on a CPU, Triton on a GPU "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            )
        else:
            _switch["on"] = True
    return _switch["on"]


def replaceable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function whose version for a CPU is called where it can be.

    That is where the first tensor among the arguments is float32 in a CPU's memory,
    outside of autocast and of whatever traces operations (torch.compile,
    torch.export, torch.jit.trace, fake tensors). A version returns NotImplemented
    for arguments that it has nothing for.
    """

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling():
            version = cpu_versions.get(function.__name__)
            if version is not None and _plain_on_cpu(args):
                result = version(*args)
                if result is not NotImplemented:
                    return result
        return function(*args)

    return call


def _plain_on_cpu(args: tuple[Any, ...]) -> bool:
    x = next(arg for arg in args if isinstance(arg, Tensor))
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and type(x) in (Tensor, nn.Parameter)  # and no fake one
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
    )

"""Chains of element-wise operations, which torch.compile can make one kernel each.

Layers as a whole are not compiled: in training, what they skip and how much they drop
changes from call to call, and a graph would be made anew each time. The chains have no
such choices in them; a few graphs serve batches of all shapes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

Chain = Callable[..., Tensor]

# Graphs of one chain: dtypes, layouts, ranks, and batches of a lone utterance.
_MAX_GRAPHS = 32

_compiled: dict[Chain, Chain] = {}
_switch = {"on": False}


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
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, _MAX_GRAPHS)
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

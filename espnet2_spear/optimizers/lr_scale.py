"""Learning rates of parts of a model, relative to the others'.

ESPnet hands an optimizer bare parameters, without names or groups. So a module that is
to learn at another rate says so on its parameters, and ScaledAdam listens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

_SCALE = "lr_scale"
_HEARD = "lr_scale_heard"


def scale_lr(module: nn.Module, scale: float) -> None:
    """Ask for ``scale`` times the learning rate for all parameters of a module.

    Raises:
        ValueError: a scale that is not positive.
    """
    if scale <= 0:
        raise ValueError(
            f"lr_scale {scale} must be positive (freeze: to learn nothing)"
        )
    for parameter in module.parameters():
        setattr(parameter, _SCALE, scale)


def split_by_lr_scale(params: Iterable[Any]) -> dict[float, list[Any]]:
    """Sort parameters, or pairs of name and parameter, by the scale they ask for."""
    groups: dict[float, list[Any]] = {}
    for item in params:
        parameter: Tensor = item[1] if isinstance(item, tuple) else item
        scale = getattr(parameter, _SCALE, 1.0)
        if scale != 1.0:
            setattr(parameter, _HEARD, True)
        groups.setdefault(scale, []).append(item)
    return groups


def check_lr_scale(module: nn.Module, what: str) -> None:
    """Refuse to train where no optimizer listened.

    Raises:
        ValueError: a parameter asks for another rate and its optimizer ignores it.
    """
    parameter = next(module.parameters())
    if getattr(parameter, _SCALE, 1.0) != 1.0 and not hasattr(parameter, _HEARD):
        raise ValueError(
            f"{what}: lr_scale is for `optim: scaledadam`; the optimizer of this run "
            "ignores it: change `optim`, or take lr_scale out"
        )

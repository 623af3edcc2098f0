"""What pre-training needs of ESPnet's option ``--use_deepspeed``.

ESPnet's DeepSpeed trainer takes optimizer, schedule, precision and accumulation from
the file of ``--deepspeed_config`` and ignores its own options for them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from espnet2_spear.errors import UserError

LOW_PRECISION = ("bf16", "fp16", "amp")


class DeepSpeedConfigError(UserError):
    """A configuration that this task cannot train with; the message says why."""


def check_deepspeed_config(path: str | Path | None) -> None:
    """Refuse configurations that would round the student's weights and the audio.

    Raises:
        DeepSpeedConfigError: no file, no JSON, or weights in half precision.
    """
    if path is None:
        raise DeepSpeedConfigError(
            "--use_deepspeed true needs --deepspeed_config, such as "
            "conf/deepspeed_zero2.json"
        )
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DeepSpeedConfigError(f"{path}: {error}") from None
    found = [key for key in LOW_PRECISION if key in config]
    if found:
        raise DeepSpeedConfigError(
            f"{path}: '{found[0]}' lets ESPnet round weights and audio; for "
            'bfloat16 products with float32 weights use "torch_autocast": '
            '{"enabled": true, "dtype": "bfloat16"}'
        )


def scale_loss_by_weight(model: nn.Module) -> None:
    """Let the model return its loss times the batch's weight.

    DeepSpeed's trainer expects a summed loss, ours is a mean: that trainer divides by
    the sum of all ranks' weights without multiplying by the own one first. With this
    the gradients are the exact mean over ranks, as with ESPnet's usual trainer.
    """

    def times_weight(
        module: nn.Module, inputs: Any, output: tuple[Tensor, dict, Tensor]
    ) -> tuple[Tensor, dict, Tensor]:
        loss, stats, weight = output
        return loss * weight.detach().to(loss.dtype), stats, weight

    model.register_forward_hook(times_weight)

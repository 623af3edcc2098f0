"""Options of the trainer, and the precision that they ask for."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import logging
from pathlib import Path

import torch
from espnet2.schedulers.abs_scheduler import (
    AbsBatchStepScheduler,
    AbsEpochStepScheduler,
)
from espnet2.tasks.abs_task import scheduler_classes
from espnet2.train.trainer import TrainerOptions
from espnet2.utils.build_dataclass import build_dataclass

from espnet2_spear.errors import UserError

LOW_PRECISION = ("bf16", "fp16", "amp")  # sections of DeepSpeed's configuration
AMP_DTYPES = ("auto", "bfloat16", "float16")
# Options of ESPnet's trainer that this one refuses -> the value that asks for nothing.
_NO_EFFECT = {
    **dict.fromkeys(("sharded_ddp", "use_adapter", "grad_noise"), False),
    **dict.fromkeys(("create_graph_in_tensorboard", "no_forward_run"), False),
    **dict.fromkeys(("ddp_comm_hook", "patience"), None),
    "nbest_averaging_interval": 0,
    "wandb_model_log_interval": -1,
}


@dataclasses.dataclass
class SpearTrainerOptions(TrainerOptions):
    """ESPnet's options and those of :func:`add_trainer_arguments`."""

    amp_dtype: str
    save_interval: int
    average_period: int
    keep_averages: int
    max_skipped_steps: int

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return torch.device("cuda" if self.ngpu > 0 else "cpu")

    @property
    def product_dtype(self) -> torch.dtype | None:
        """Type of matrix products under autocast; None: that of the weights.

        ``auto`` is bfloat16 on a GPU that computes in it, else float16 on a GPU; a CPU
        computes in a lower precision only if one is named, since most are slower then.
        """
        if not self.use_amp:
            return None
        if self.amp_dtype != "auto":
            return getattr(torch, self.amp_dtype)
        if self.ngpu == 0:
            return None
        return torch.bfloat16 if _computes_in_bfloat16() else torch.float16

    def autocast(self) -> torch.autocast:
        """Context of forward passes."""
        dtype = self.product_dtype
        return torch.autocast(
            self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None
        )

    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """Loss scale for float16; bfloat16 has the range of float32 and needs none.

        ESPnet scales by 65 536 and more in both cases. It begins at 1, as in the
        published training, and doubles after 500 finite steps, so that overflow costs
        one step in 500.
        """
        if self.product_dtype != torch.float16:
            return None
        return torch.amp.GradScaler(
            self.device.type, init_scale=1.0, growth_interval=500
        )


def add_trainer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this trainer."""
    group = parser.add_argument_group("SpearTrainer related")
    group.add_argument(
        "--amp_dtype",
        choices=AMP_DTYPES,
        default="auto",
        help="Precision of --use_amp true; auto: bfloat16 where the GPU computes in "
        "it, else float16, and none on a CPU",
    )
    group.add_argument(
        "--save_interval",
        type=int,
        default=1000,
        help="Steps between checkpoints within an epoch; 0: at its end only",
    )
    group.add_argument(
        "--average_period",
        type=int,
        default=200,
        help="Steps between samples of the running average of the model; 0: none",
    )
    group.add_argument(
        "--keep_averages",
        type=int,
        default=10,
        help="Epochs whose running average is kept, for spear_average, which needs "
        "one more than it averages; each takes 4 bytes a parameter on the disk",
    )
    group.add_argument(
        "--max_skipped_steps",
        type=int,
        default=50,
        help="Steps of an epoch that may be skipped because loss or gradients "
        "are not finite; one more ends the training",
    )
    group.add_argument(
        "--rank_timeout",
        type=float,
        default=120.0,
        help="Seconds of silence after which a rank of a distributed training "
        "counts as dead, which ends the others; 0: leave it to the backend",
    )


def build_trainer_options(args: argparse.Namespace) -> SpearTrainerOptions:
    """Collect the options.

    Raises:
        ValueError: an option that this trainer does not support, or a precision that
            the device does not compute in.
    """
    for name, none in _NO_EFFECT.items():
        if getattr(args, name, none) != none:
            raise ValueError(
                f"--{name} {getattr(args, name)} is not supported in pre-training"
            )
    scheduler = scheduler_classes.get(args.scheduler)
    if scheduler and (
        not issubclass(scheduler, AbsBatchStepScheduler)
        or issubclass(scheduler, AbsEpochStepScheduler)
    ):
        raise ValueError(
            f"--scheduler {args.scheduler} counts epochs; choose one that counts "
            "steps, such as eden"
        )
    options = build_dataclass(SpearTrainerOptions, args)
    if not options.use_amp:
        if options.amp_dtype != "auto":
            raise ValueError(
                f"--amp_dtype {options.amp_dtype} needs --use_amp true; without it the "
                f"training computes in {options.train_dtype}"
            )
        return options
    if options.train_dtype != "float32":
        raise ValueError(
            f"--use_amp true keeps weights in float32; --train_dtype "
            f"{options.train_dtype} does not go with it"
        )
    if options.product_dtype is None:
        logging.warning(
            "--use_amp true has no effect on a CPU: the training computes in float32; "
            "--amp_dtype bfloat16 is for a CPU that multiplies faster in it"
        )
    gpu = options.ngpu > 0 and torch.cuda.is_available()
    if gpu and options.product_dtype == torch.bfloat16 and not _computes_in_bfloat16():
        raise ValueError(
            f"--amp_dtype bfloat16: {torch.cuda.get_device_name()} does not compute in "
            "it; use --amp_dtype float16, or auto"
        )
    return options


def check_deepspeed_config(path: str | Path | None) -> None:
    """Refuse configurations that would round the student's weights and the audio.

    ESPnet's DeepSpeed trainer takes optimizer, schedule, precision and accumulation
    from this file and ignores its own options for them.

    Raises:
        UserError: no file, no JSON, or weights in half precision.
    """
    if path is None:
        raise UserError(
            "--use_deepspeed true needs --deepspeed_config, such as "
            "conf/deepspeed_zero2.json"
        )
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    found = [key for key in LOW_PRECISION if key in config]
    if found:
        raise UserError(
            f"{path}: '{found[0]}' lets ESPnet round weights and audio; for "
            'bfloat16 products with float32 weights use "torch_autocast": '
            '{"enabled": true, "dtype": "bfloat16"}'
        )


def disable_missing_backends(options: SpearTrainerOptions) -> None:
    """Curves and pictures are optional, and so are the packages that draw them."""
    for option, package in (
        ("use_matplotlib", "matplotlib"),
        ("use_tensorboard", "tensorboard"),
    ):
        if getattr(options, option) and importlib.util.find_spec(package) is None:
            logging.warning(f"{package} is not installed: as with --{option} false")
            setattr(options, option, False)


def _computes_in_bfloat16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(
        including_emulation=False
    )

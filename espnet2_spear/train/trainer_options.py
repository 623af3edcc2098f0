"""Options of the trainer."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import logging

from espnet2.train.trainer import TrainerOptions
from espnet2.utils.build_dataclass import build_dataclass


@dataclasses.dataclass
class SpearTrainerOptions(TrainerOptions):
    """ESPnet's options and those of :func:`add_trainer_arguments`."""

    save_interval: int
    average_period: int
    keep_averages: int
    max_skipped_steps: int


def add_trainer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this trainer."""
    group = parser.add_argument_group("SpearTrainer related")
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
        help="Epochs whose running average is kept, for spear_average",
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
        default=40.0,
        help="Seconds of silence after which a rank of a distributed training "
        "counts as dead, which ends the others; 0: leave it to the backend",
    )


def build_trainer_options(args: argparse.Namespace) -> SpearTrainerOptions:
    """Collect the options.

    Raises:
        ValueError: an option that this trainer does not support.
    """
    for name in ("sharded_ddp", "create_graph_in_tensorboard", "use_adapter"):
        if getattr(args, name, False):
            raise ValueError(f"--{name} true is not supported in pre-training")
    if args.use_amp and args.ngpu == 0:
        logging.warning(
            "--use_amp true has no effect on a CPU: the training computes in "
            f"{args.train_dtype}"
        )
    return build_dataclass(SpearTrainerOptions, args)


def leave_out_missing_packages(options: SpearTrainerOptions) -> None:
    """Curves and pictures are optional, and so are the packages that draw them."""
    for option, package in (
        ("use_matplotlib", "matplotlib"),
        ("use_tensorboard", "tensorboard"),
    ):
        if getattr(options, option) and importlib.util.find_spec(package) is None:
            logging.warning(f"{package} is not installed: as with --{option} false")
            setattr(options, option, False)

"""Let a training configuration fail before hours are spent on data and codes."""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
import yaml
from espnet2.tasks.abs_task import scheduler_classes

from espnet2_spear.data.build import check_sampling_options
from espnet2_spear.tasks.spear import SpearTask


def check_training(config: Mapping[str, Any], train_args: Sequence[str]) -> None:
    """Build all that spear_train builds of its options, but for data and numbers.

    Args:
        config: of spear_train.
        train_args: further words of its command line.

    Raises:
        ValueError: options that it would refuse.
    """

    def refuse(message: str) -> NoReturn:
        raise ValueError(message)

    parser = SpearTask.get_parser()
    parser.error = refuse
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        yaml.safe_dump(dict(config), file)
        file.flush()
        words = ["--config", file.name, "--output_dir", "unused", *train_args]
        args = parser.parse_args(words)
    args.compile = False
    logging.disable(logging.WARNING)  # stage 7 says it, and where it has GPUs
    try:
        check_sampling_options(args)
        SpearTask.trainer.build_options(args)
        with torch.device("meta"):  # no memory, whatever the size
            model = SpearTask.build_model(args)
        for optimizer in SpearTask.build_optimizers(args, model):
            if args.scheduler is not None:
                scheduler_classes[args.scheduler](optimizer, **args.scheduler_conf)
    except (TypeError, RuntimeError) as error:  # such as an option without a meaning
        raise ValueError(f"{type(error).__name__}: {error}") from error
    finally:
        logging.disable(logging.NOTSET)

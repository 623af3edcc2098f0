"""Let a training configuration fail before hours are spent on data and codes."""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import yaml

from espnet2_spear.tasks.spear import SpearTask


def check_training(config: Mapping[str, Any], train_args: Sequence[str]) -> None:
    """Build all that spear_train builds of its options, and open the files they name.

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
    logging.disable(logging.WARNING)  # stage 7 says it, and where it has GPUs
    try:
        SpearTask.check_options(args)
    finally:
        logging.disable(logging.NOTSET)

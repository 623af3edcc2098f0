#!/usr/bin/env python3
"""Find out what a training of asr1 or cls1 will refuse, before data are made for it.

    check_training.py --task asr --inference_model NAME --exp_dir DIR -- OPTIONS

OPTIONS are those of the training. Model, optimizer and schedule are built without
numbers (some seconds), and the weights that options name are compared with the model.
"""

import argparse
import logging
from importlib import import_module
from pathlib import Path

from espnet2_spear.errors import UserError
from espnet2_spear.fileio.explain import command, option_parser, read_options

TASKS = {  # class, and tokens in place of a list that is made in stage 2
    "asr": ("espnet2_spear.tasks.asr:ASRTask", ["<blank>", "<unk>", "a", "<sos/eos>"]),
    "cls": ("espnet2_spear.tasks.cls:CLSTask", ["a", "b", "<unk>"]),
}


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = option_parser(__doc__)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--inference_model", required=True, help="to be used later")
    parser.add_argument("--exp_dir", type=Path, required=True, help="where it will be")
    parser.add_argument("options", nargs="+", help="of the training, with --config")
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """End with a line and status 1 if the training would be refused.

    Raises:
        UserError: it would refuse its options, or not write the model.
    """
    logging.disable(logging.WARNING)  # the training says it
    # Takes seconds: not before the options above are right.
    from espnet2_spear.tasks.training_checks import check_model, check_model_name

    name, tokens = TASKS[args.task]
    module, _, cls = name.partition(":")
    task = getattr(import_module(module), cls)
    try:
        options = read_options(task.get_parser(), args.options)
        if not (args.exp_dir / args.inference_model).exists():
            check_model_name(args.inference_model, options)
        if not Path(str(options.token_list)).is_file():
            options.token_list = tokens
        check_model(task, options)
    except ValueError as error:
        config = args.options[args.options.index("--config") + 1]
        raise UserError(f"{config}, or further options: {error}") from error


if __name__ == "__main__":
    main()

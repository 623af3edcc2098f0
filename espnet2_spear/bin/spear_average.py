#!/usr/bin/env python3
"""Write the mean of a training's model between two epochs.

Better than any single epoch, as a rule, and free: the training keeps running averages
of all its steps, and two of them give the mean over what lies between. The file is a
state dict as ``Nepoch.pth`` is: give it to --ckpt, --init_param or load_model().
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from espnet2_spear.fileio.atomic import save_whole
from espnet2_spear.fileio.explain import command, option_parser
from espnet2_spear.train.average import average_between


def get_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = option_parser(__doc__)
    parser.add_argument("--exp", type=Path, required=True, help="Folder of a training")
    parser.add_argument(
        "--from_epoch",
        type=int,
        required=True,
        help="The average begins after this epoch; 0: with the training",
    )
    parser.add_argument("--to_epoch", type=int, required=True, help="Last epoch")
    parser.add_argument(
        "--output",
        type=Path,
        help="by default EXP/average_FROM_TO.pth, which has its config.yaml beside it",
    )
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Average.

    Example:
        % python -m espnet2_spear.bin.spear_average --exp exp/spear_base \
            --from_epoch 96 --to_epoch 100
    """
    state = average_between(args.exp, args.from_epoch, args.to_epoch)
    output = args.output
    if output is None:
        output = args.exp / f"average_{args.from_epoch}_{args.to_epoch}.pth"
    save_whole(state, output)
    logging.info(f"{output}: mean of epochs {args.from_epoch} to {args.to_epoch}")


if __name__ == "__main__":
    main()

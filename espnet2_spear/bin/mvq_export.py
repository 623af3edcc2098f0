#!/usr/bin/env python3
"""Write a quantizer as a file that the multi-quantization library can load."""

import argparse
import logging

from espnet2.utils.types import str2bool

from espnet2_spear.fileio.explain import command, option_parser
from espnet2_spear.mvq.files import export_library, load_quantizer


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = option_parser(__doc__)
    parser.add_argument("--quantizer", required=True, help="file to read, of kind mvq")
    parser.add_argument("--output", required=True, help="file to write")
    parser.add_argument(
        "--statistics",
        type=str2bool,
        default=True,
        help="true: {'quantizer': state dict, 'mean', 'std'}, as SPEAR stores it; "
        "false: the bare state dict, possible without standardisation only",
    )
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Convert; see ``--help``. The other direction needs no conversion."""
    export_library(load_quantizer(args.quantizer), args.output, args.statistics)
    logging.info(f"{args.output}: written for the multi-quantization library")


if __name__ == "__main__":
    main()

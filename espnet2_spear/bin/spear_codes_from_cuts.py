#!/usr/bin/env python3
"""Take over codes that an icefall recipe left in the cuts of lhotse.

The codes of a field (codebook_indexes; wavlm_ or dasheng_codebook_indexes where there
are two teachers) become those of a data directory, which stage 7 reads: NAME.scp and
NAME.json as of spear_tokenize. Utterances without codes get the row of -1.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from espnet2_spear.bin.spear_check_codes import named
from espnet2_spear.codes.from_cuts import take_over
from espnet2_spear.fileio.atomic import write_json
from espnet2_spear.fileio.explain import command, option_parser
from espnet2_spear.fileio.tables import DataDirError
from espnet2_spear.mvq.files import load_quantizer


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = option_parser(__doc__)
    parser.add_argument(
        "--cuts",
        required=True,
        action="append",
        type=named,
        metavar="NAME=PATH",
        help="name of the corpus in --data_config, and its cuts; once for each",
    )
    parser.add_argument("--field", default="codebook_indexes")
    parser.add_argument(
        "--quantizer",
        type=Path,
        help="file of the quantizer that made them, ours or icefall's; without it the "
        "codes have no identity that a training could compare",
    )
    parser.add_argument(
        "--codebook_size", type=int, default=256, help="without --quantizer"
    )
    parser.add_argument(
        "--data_dir", type=Path, required=True, help="such as dump/raw/train"
    )
    parser.add_argument("--scp", type=Path, required=True, help="file to write")
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Convert; see ``--help``.

    Raises:
        UserError: cuts or arrays that do not fit.
    """
    sources = [(name, Path(path)) for name, path in args.cuts]
    if gone := [str(path) for _, path in sources if not path.exists()]:
        raise DataDirError(f"--cuts {', '.join(gone)}: no such file or folder")
    facts = {"cuts": ["=".join(source) for source in args.cuts], "field": args.field}
    size, number = args.codebook_size, None
    if args.quantizer:
        quantizer = load_quantizer(args.quantizer)
        size, number = quantizer.codebook_size, quantizer.num_codebooks
        facts |= {"quantizer": str(args.quantizer), "quantizer_id": quantizer.identity}
    facts |= take_over(sources, args.field, args.data_dir, args.scp, size, number)
    write_json(args.scp.with_suffix(".json"), facts)
    logging.info(
        f"{args.scp}: codes of {facts['tokenized']} utterances, {facts['without']} "
        "without any"
    )


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Copy a teacher's codes from arks to a store for very many utterances.

In training it takes the place of the scp file: FOLDER,codes_<teacher>,codes_store
instead of FILE.scp,codes_<teacher>,kaldi_ark.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
from tqdm import tqdm

from espnet2_spear.codes.facts import codes_facts, codes_shape
from espnet2_spear.codes.store import CodeStoreWriter
from espnet2_spear.constants import MISSING
from espnet2_spear.fileio.ark import SCP_COLUMNS, read_matrix
from espnet2_spear.fileio.explain import main_with_one_line_errors
from espnet2_spear.fileio.tables import rows


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--scp", required=True, help="of spear_tokenize, with its NAME.json beside it"
    )
    parser.add_argument("--output_dir", required=True, help="folder of the store")
    parser.add_argument(
        "--file_bytes", type=int, default=1 << 30, help="of a file of codes, about"
    )
    return parser


def main(cmd=None):
    """Copy; see ``--help``.

    Example:
        % python -m espnet2_spear.bin.spear_store_codes \
            --scp dump/codes/train/speech.scp --output_dir dump/codes/train/speech.store
    """
    main_with_one_line_errors(get_parser(), run, cmd)


def run(args: argparse.Namespace) -> None:
    """Copy the codes of one scp file."""
    scp = Path(args.scp)
    num, facts = codes_shape(scp).num_codebooks, codes_facts(scp)
    without = 0
    with CodeStoreWriter(args.output_dir, num, facts, args.file_bytes) as writer:
        table = rows(scp, SCP_COLUMNS)
        for utt, spec, _ in tqdm(table, unit=" utterances", disable=None):
            codes = read_matrix(spec, utt)
            missing = len(codes) == 1 and bool(np.all(codes == MISSING))
            without += missing
            writer.write(utt, None if missing else codes)
    logging.info(
        f"{args.output_dir}: codes of {len(writer)} utterances, {without} of them "
        "without any"
    )


if __name__ == "__main__":
    main()

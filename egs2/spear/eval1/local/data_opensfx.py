#!/usr/bin/env python3
"""The sounds of OpenSFX (trains, ships, cows, ...) as a data directory of noise."""

import argparse
import logging
from functools import partial

from containers import read_cat
from sounds import OPENSFX, package_parser, write_sound

from espnet2_spear.fileio.datadir import Entry, write_entries
from espnet2_spear.fileio.explain import command

get_parser = partial(package_parser, __doc__)


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Write the data directory."""
    found = []
    for index, (_, content) in enumerate(read_cat(args.root / OPENSFX)):
        utt = f"opensfx-{index:02d}"
        path = write_sound(args.out_dir / "clips", utt, ".wav", content)
        found.append(Entry(utt, str(path.absolute()), utt, "audio"))
    count = write_entries(sorted(found), args.out_dir)
    logging.info("%d sounds", count)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Phones of a Russian voice as a data directory, with the time at which each ends.

festvox-ru has 620 sentences read by one man, labelled for synthesis. Every fourth is
taken. Besides the usual tables it writes `phones`: an utterance, and of each phone its
name and its end in seconds.
"""

import argparse
import logging
from functools import partial
from pathlib import Path

from sounds import package_parser

from espnet2_spear.fileio.datadir import DataDirError, Entry, write_entries, write_table
from espnet2_spear.fileio.explain import command

VOICE = "usr/share/festival/voices/russian/msu_ru_nsh_clunits"
EVERY = 4


def read_lab(path: Path) -> str:
    """Phones and ends of a label file of Festival: `end colour phone` behind a `#`.

    Raises:
        DataDirError: not such a file.
    """
    head, mark, body = path.read_text(encoding="utf-8").partition("#\n")
    lines = [line.split() for line in body.splitlines()]
    if not mark or not lines or any(len(line) != 3 for line in lines):
        raise DataDirError(f"{path}: expected 'end colour phone' lines behind a '#'")
    return " ".join(f"{phone} {float(end):.3f}" for end, _, phone in lines)


get_parser = partial(package_parser, __doc__)


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Write the data directory.

    Raises:
        DataDirError: no labels, or a malformed file of them.
    """
    voice = args.root / VOICE
    files = sorted((voice / "lab").glob("*.lab"))[::EVERY]
    if not files:
        raise DataDirError(f"{voice}/lab: no labels; run stage 1 of run.sh again")
    phones = {file.stem: read_lab(file) for file in files}
    wavs = {utt: str((voice / "wav" / f"{utt}.wav").absolute()) for utt in phones}
    found = [Entry(utt, wav, "ru_nsh", "speech") for utt, wav in wavs.items()]
    write_entries(sorted(found), args.out_dir)
    write_table(args.out_dir / "phones", phones)
    logging.info("%d sentences", len(phones))


if __name__ == "__main__":
    main()

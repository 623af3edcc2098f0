#!/usr/bin/env python3
"""Divide the transcribed English prompts into en_train, en_dev and en_test.

The dev and test prompts are listed in this folder (split_en_dev.txt and
split_en_test.txt); no text occurs in two of the sets.
"""

import argparse
import logging
from pathlib import Path

from espnet2_spear.fileio.datadir import DataDirError, Entry, entries, write_entries
from espnet2_spear.fileio.explain import command
from espnet2_spear.fileio.tables import open_text


def read_list(path: Path) -> list[str]:
    """Return the utterance ids of a list."""
    with open_text(path) as lines:
        return [line.strip() for line in lines if line.strip()]


def split(source: Path, dev: list[str], test: list[str]) -> dict[str, list[Entry]]:
    """Return the three sets, each in the order of ids.

    Raises:
        DataDirError: a listed prompt is missing, or a text is in two sets.
    """
    data = [entry for entry in entries(source, ("utt2domain",)) if entry.text]
    listed = {"en_dev": {*dev}, "en_test": {*test}}
    every = {entry.utt for entry in data}
    for name, utts in listed.items():
        missing = sorted(utts - every)
        if missing:
            raise DataDirError(
                f"{source}/text: '{missing[0]}' of split_{name}.txt is missing "
                f"({len(missing)} in all); prepare the English prompts again"
            )
    listed["en_train"] = every.difference(dev, test)
    owner: dict[str, str] = {}
    sets = {}
    for name, utts in listed.items():
        sets[name] = [entry for entry in data if entry.utt in utts]
        for entry in sets[name]:
            text = entry.text
            if owner.setdefault(text, name) != name:
                raise DataDirError(
                    f"the text of '{entry.utt}' is in {owner[text]} and {name}: "
                    f"{text}; correct split_en_dev.txt and split_en_test.txt"
                )
    return sets


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="English prompts")
    parser.add_argument("--dev", type=Path, required=True, help="list of ids")
    parser.add_argument("--test", type=Path, required=True, help="list of ids")
    parser.add_argument("--max_utts", type=int, default=0, help="per set; 0: all")
    parser.add_argument("--out_dir", type=Path, required=True, help="parent folder")
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Write the three data directories."""
    sets = split(args.source, read_list(args.dev), read_list(args.test))
    for name, found in sets.items():
        part = found[: args.max_utts or None]
        write_entries(part, args.out_dir / name)
        words = sum(len(entry.text.split()) for entry in part)
        logging.info("%s: %d utterances, %d words", name, len(part), words)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Divide the transcribed English prompts into en_train, en_dev and en_test.

The dev and test prompts are listed in this folder (split_en_dev.txt and
split_en_test.txt); no text occurs in two of the sets.
"""

import argparse
import logging
from pathlib import Path

from espnet2_spear.fileio.datadir import DataDir, DataDirError
from espnet2_spear.fileio.explain import run_command
from espnet2_spear.fileio.tables import open_text


def read_list(path: Path) -> list[str]:
    """Return the utterance ids of a list."""
    with open_text(path) as lines:
        return [line.strip() for line in lines if line.strip()]


def split(data: DataDir, dev: list[str], test: list[str]) -> dict[str, DataDir]:
    """Return the three sets.

    Raises:
        DataDirError: a listed prompt is missing, or a text is in two sets.
    """
    listed = {"en_dev": dev, "en_test": test}
    taken = set(dev) | set(test)
    for name, utts in listed.items():
        missing = sorted(set(utts) - set(data.text))
        if missing:
            raise DataDirError(
                f"{data.path}/text: '{missing[0]}' of split_{name}.txt is missing "
                f"({len(missing)} in all); prepare the English prompts again"
            )
    listed["en_train"] = [utt for utt in data.utterances if utt not in taken]
    owner: dict[str, str] = {}
    sets = {}
    for name, utts in listed.items():
        sets[name] = data.select(utt for utt in utts if utt in data.text)
        for utt, text in sets[name].text.items():
            if owner.setdefault(text, name) != name:
                raise DataDirError(
                    f"the text of '{utt}' is in {owner[text]} and {name}: {text}; "
                    "correct split_en_dev.txt and split_en_test.txt"
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


def main(cmd: list[str] | None = None) -> None:
    """Write the three data directories."""
    args = get_parser().parse_args(cmd)
    data = DataDir.load(args.source)
    for name, part in split(data, read_list(args.dev), read_list(args.test)).items():
        if args.max_utts > 0:
            part = part.select(part.utterances[: args.max_utts])
        part.path = args.out_dir / name
        part.validate(require=("utt2domain", "text"))
        part.write(part.path)
        words = sum(len(text.split()) for text in part.text.values())
        logging.info("%s: %d utterances, %d words", name, len(part.text), words)


if __name__ == "__main__":
    run_command(main)

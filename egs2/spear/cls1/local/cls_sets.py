#!/usr/bin/env python3
"""Write the labels of a formatted set in the form that ESPnet's cls task reads.

Beside the set's wav.scp come `labels` (utterance and labels, of the utterances that
formatting kept), the same as `text`, which ESPnet's cls.sh reads, and, for a training
set, `category2utt` (class and its utterances, for weighted sampling) and the list of
all classes, and <unk>, which has to be last, as tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from espnet2_spear.fileio.datadir import entries
from espnet2_spear.fileio.explain import command
from espnet2_spear.fileio.external_sorter import ExternalSorter
from espnet2_spear.fileio.tables import DataDirError, join, sorted_rows, table_writer

UNKNOWN = "<unk>"


def labels_of(set_dir: Path, labels: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the utterances of a set with their labels.

    Raises:
        DataDirError: an utterance without label.
    """
    rows = sorted_rows(labels, "utterance labels")
    for utt, (entry, row) in join(entries(set_dir), rows):
        if row is None:
            raise DataDirError(f"{labels}: has no label of '{utt}'; add its line")
        if entry is not None:
            yield utt, row[1].split()


def write_training_set(set_dir: Path, labels: Path, token_list: Path) -> None:
    """Write labels, text, category2utt and the token list."""
    token_list.parent.mkdir(parents=True, exist_ok=True)
    with (
        table_writer(set_dir / "category2utt") as category2utt,
        table_writer(set_dir / "text") as text,
        table_writer(set_dir / "labels") as copy,
        ExternalSorter[tuple[str, str]](folder=set_dir) as classes,
    ):
        for utt, names in labels_of(set_dir, labels):
            text.add(utt, " ".join(names))
            copy.add(utt, " ".join(names))
            for name in dict.fromkeys(names):
                classes.add((name, utt))
        tokens = []
        for name, group in groupby(classes, key=itemgetter(0)):
            category2utt.add_words(name, (utt for _, utt in group))
            tokens.append(name)
        if len(tokens) < 2:
            raise DataDirError(f"{labels}: needs two classes at least")
    token_list.write_text("".join(f"{name}\n" for name in [*tokens, UNKNOWN]))


def write_other_set(set_dir: Path, labels: Path, token_list: Path) -> None:
    """Write labels and text.

    Raises:
        DataDirError: a label that the training set does not have.
    """
    known = set(token_list.read_text(encoding="utf-8").split())
    with (
        table_writer(set_dir / "text") as text,
        table_writer(set_dir / "labels") as copy,
    ):
        for utt, names in labels_of(set_dir, labels):
            if unknown := [name for name in names if name not in known]:
                raise DataDirError(
                    f"{labels}: '{utt}' has the label '{unknown[0]}', which is not in "
                    f"{token_list}: the training set has no such clip"
                )
            text.add(utt, " ".join(names))
            copy.add(utt, " ".join(names))


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--labels", type=Path, required=True, help="utterance label ..."
    )
    parser.add_argument("--set_dir", type=Path, required=True, help="formatted set")
    parser.add_argument("--token_list", type=Path, required=True)
    parser.add_argument(
        "--train", action="store_true", help="make the token list of it"
    )
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Write what training needs of labels; see ``--help``."""
    write = write_training_set if args.train else write_other_set
    write(args.set_dir, args.labels, args.token_list)


if __name__ == "__main__":
    main()

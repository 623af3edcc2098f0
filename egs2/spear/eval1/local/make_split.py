#!/usr/bin/env python3
"""Divide a data directory into train, dev and test once, for a file in splits/.

Three fifths of the clips are for training, one fifth each for dev and test, by class as
far as groups allow, which are not divided. A line names a group, or a clip where there
are no `groups`.
"""

import argparse
from pathlib import Path

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from espnet2_spear.fileio.datadir import read_table, write_table
from espnet2_spear.fileio.explain import command


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True, help="with labels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Write the split."""
    labels = read_table(args.data_dir / "labels", "utterance label")
    groups_file = args.data_dir / "groups"
    groups = (
        read_table(groups_file, "utterance group")
        if groups_file.exists()
        else {utt: utt for utt in labels}
    )
    utts = sorted(labels)
    keys = np.array([groups[utt] for utt in utts])
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=args.seed)
    parts = dict.fromkeys(keys.tolist(), "train")
    names = ("test", "dev")
    classes = [labels[utt] for utt in utts]
    for name, (_, rows) in zip(names, folds.split(utts, classes, keys), strict=False):
        parts.update(dict.fromkeys(keys[rows].tolist(), name))
    write_table(args.output, dict(sorted(parts.items())))


if __name__ == "__main__":
    main()

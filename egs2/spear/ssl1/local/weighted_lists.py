#!/usr/bin/env python3
"""Write the lists of a training in which corpora have weights.

The utterances of a corpus of weight w (ids begin with its name and a hyphen) are listed
floor(w) times, and a part of them once more, so that together they are listed w times;
repetitions have ids "2-...", "3-..." and the same audio and codes. A weight below 1
keeps a part. Which utterances those are is decided by a hash of their ids.
"""

import argparse
import hashlib
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from espnet2_spear.fileio.datadir import DataDirError, read_table

TABLES = ("wav.scp", "utt2domain", "utt2num_samples")


def repetitions(utt: str, weight: float) -> int:
    """How often an utterance is listed."""
    digest = hashlib.sha256(f"weight {utt}".encode("utf-8", "surrogateescape")).digest()
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    return int(weight) + (fraction < weight % 1)


def expand(source: Path, target: Path, weights: dict[str, float]) -> Counter:
    """Write a table with its lines repeated, in the order of their ids.

    The table is read line by line, once a repetition: it may be larger than memory.

    Returns:
        lines written, by corpus.

    Raises:
        DataDirError: an utterance of a corpus that has no weight.
    """

    def lines(number: int) -> Iterator[tuple[str, str]]:
        with source.open(encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                utt = line.split(maxsplit=1)[0]
                corpus = utt.partition("-")[0]
                if corpus not in weights:
                    raise DataDirError(
                        f"{source}: '{utt}' is of none of the corpora "
                        f"{', '.join(weights)}; run all stages with the same data"
                    )
                if repetitions(utt, weights[corpus]) >= number:
                    yield corpus, line if number == 1 else f"{number}-{line}"

    counts: Counter = Counter()
    part = target.with_name(target.name + ".part")
    with part.open("w", encoding="utf-8", errors="surrogateescape") as out:
        # "2-..." and so on come before all names of corpora, which begin with a letter
        # or _, as the order of Kaldi's tables wants.
        most = max(int(weight) + 1 for weight in weights.values())
        for number in [*sorted(range(2, most + 1), key=str), 1]:
            for corpus, line in lines(number):
                out.write(line)
                counts[corpus] += 1
    part.replace(target)
    return counts


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="corpus and weight")
    parser.add_argument("--data_dir", type=Path, required=True, help="dump/raw/train")
    parser.add_argument(
        "--codes_dir", type=Path, required=True, help="dump/codes/train"
    )
    parser.add_argument("--teachers", nargs="+", required=True)
    parser.add_argument("--out_dir", type=Path, required=True)
    return parser


def main(cmd: list[str] | None = None) -> None:
    """Write the lists."""
    args = get_parser().parse_args(cmd)
    table = read_table(args.weights, "corpus weight")
    weights = {name: float(value) for name, value in table.items()}
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for name in args.teachers:
        codes = args.codes_dir / f"{name}.scp"
        expand(codes, args.out_dir / codes.name, weights)
        shutil.copy(codes.with_suffix(".json"), args.out_dir)
    for name in reversed(TABLES):
        counts = expand(args.data_dir / name, args.out_dir / name, weights)
    for name, count in sorted(counts.items()):
        logging.info("%s: weight %s, %d lines", name, weights[name], count)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="(weighted_lists.py) %(message)s")
    main()

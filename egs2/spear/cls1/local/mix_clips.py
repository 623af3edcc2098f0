#!/usr/bin/env python3
"""Mix pairs of labelled clips: each mixture has both labels.

Clips are divided into blocks, which no group crosses and which have some of every class
as far as possible; only clips of one block and of different classes are mixed, and the
block is the mixture's group: what a split holds out was never heard in training.
"""

import argparse
import logging
from collections import defaultdict
from pathlib import Path

import numpy as np
import soundfile

from espnet2_spear.fileio.audio import read_audio, to_int16
from espnet2_spear.fileio.datadir import DataDir, DataDirError, read_table, write_table
from espnet2_spear.fileio.names import file_name

RATE = 16000
LONGEST = 5 * RATE  # samples of a mixture
LEVEL_DB = -25.0  # of each clip, of full scale
RANGE_DB = 5.0  # by which clips differ at most from it


def blocks_of(
    labels: dict[str, str], groups: dict[str, str], number: int, seed: int
) -> dict[str, int]:
    """Return utterance -> block: groups of each class dealt out, in random order."""
    rng = np.random.default_rng(seed)
    members: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for utt, label in sorted(labels.items()):
        members[label][groups[utt]].append(utt)
    block_of: dict[str, int] = {}
    of_group: dict[str, int] = {}
    for label in sorted(members):
        names = sorted(members[label])
        start = int(rng.integers(number))
        for place, index in enumerate(rng.permutation(len(names)).tolist()):
            group = names[index]
            of_group.setdefault(group, (start + place) % number)
            for utt in members[label][group]:
                block_of[utt] = of_group[group]
    return block_of


def mix(paths: list[str], rng: np.random.Generator) -> np.ndarray:
    """Add clips at random places and levels: (samples,), at most 5 s.

    Raises:
        DataDirError: a clip at another rate than 16 kHz.
    """
    parts = []
    for path in paths:
        samples, rate = read_audio(path)
        if rate != RATE:
            raise DataDirError(f"{path}: is at {rate} Hz; run stage 2 of run.sh again")
        samples = samples[:LONGEST]
        level = LEVEL_DB + rng.uniform(-RANGE_DB, RANGE_DB)
        rms = max(float(np.sqrt(np.mean(samples**2))), 1e-6)
        parts.append(samples * (10 ** (level / 20) / rms))
    mixture = np.zeros(max(map(len, parts)), np.float32)
    for part in parts:
        start = int(rng.integers(len(mixture) - len(part) + 1))
        mixture[start : start + len(part)] += part
    return mixture / max(1.0, float(np.abs(mixture).max()))


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wav_scp", type=Path, required=True, help="16 kHz files")
    parser.add_argument("--labels", type=Path, required=True, help="one a clip")
    parser.add_argument("--groups", type=Path, required=True)
    parser.add_argument("--out_dir", type=Path, required=True, help="data directory")
    parser.add_argument("--num_blocks", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(cmd: list[str] | None = None) -> None:
    """Write as many mixtures as there are clips: each clip with another one.

    Raises:
        DataDirError: a clip without label or group.
    """
    args = get_parser().parse_args(cmd)
    paths = read_table(args.wav_scp, "utterance file")
    tables = [
        read_table(table, "utterance value") for table in (args.labels, args.groups)
    ]
    for utt in paths:
        if utt not in tables[0] or utt not in tables[1]:
            raise DataDirError(f"{args.labels}: no label or group of '{utt}'; add it")
    labels, groups = ({utt: table[utt] for utt in paths} for table in tables)
    block_of = blocks_of(labels, groups, args.num_blocks, args.seed)
    rng = np.random.default_rng(args.seed)
    clips_of: dict[int, list[str]] = defaultdict(list)
    for utt in sorted(paths):
        clips_of[block_of[utt]].append(utt)
    data = DataDir(wav_scp={}, utt2spk={}, path=args.out_dir)
    new_labels, new_groups = {}, {}
    folder = args.out_dir / "mixtures"
    folder.mkdir(parents=True, exist_ok=True)
    for block, clips in sorted(clips_of.items()):
        for first in clips:
            others = [utt for utt in clips if labels[utt] != labels[first]]
            if not others:
                continue
            second = others[int(rng.integers(len(others)))]
            utt = f"mix{block:02d}-{first}"
            path = folder / file_name(utt, ".flac")
            samples = to_int16(mix([paths[first], paths[second]], rng))[0]
            soundfile.write(path, samples, RATE)
            data.wav_scp[utt] = str(path.absolute())
            data.utt2spk[utt] = utt
            data.utt2domain[utt] = "audio"
            new_labels[utt] = " ".join(sorted([labels[first], labels[second]]))
            new_groups[utt] = f"block{block:02d}"
    data.validate(require=("utt2domain",))
    data.write(args.out_dir)
    write_table(args.out_dir / "labels", new_labels)
    write_table(args.out_dir / "groups", new_groups)
    logging.info("%d mixtures of two in %d blocks", len(new_labels), len(clips_of))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="(mix_clips.py) %(message)s")
    main()

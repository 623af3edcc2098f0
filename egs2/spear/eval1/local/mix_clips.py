#!/usr/bin/env python3
"""Mix pairs of labelled clips: each mixture has both labels.

Only clips of one part (train, dev, test) and of different classes are mixed, so that
what is tested was never heard in training. Besides the usual tables it writes `labels`
(both classes) and `splits` (the part).
"""

import argparse
import logging
from collections import defaultdict
from pathlib import Path

import numpy as np
import soundfile

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.audio import read_audio, to_int16
from espnet2_spear.fileio.datadir import DataDirError, Entry, read_table, write_entries
from espnet2_spear.fileio.explain import command
from espnet2_spear.fileio.names import file_name

LONGEST = 5 * SAMPLE_RATE  # samples of a mixture
LEVEL_DB = -25.0  # of each clip, of full scale
RANGE_DB = 5.0  # by which clips differ at most from it


def mix(paths: list[str], rng: np.random.Generator) -> np.ndarray:
    """Add clips at random places and levels: (samples,), at most 5 s.

    Raises:
        DataDirError: a clip at another rate than 16 kHz.
    """
    parts = []
    for path in paths:
        samples, rate = read_audio(path)
        if rate != SAMPLE_RATE:
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
    parser.add_argument("--source", type=Path, required=True, help="labels and groups")
    parser.add_argument(
        "--splits", type=Path, required=True, help="clip or group, part"
    )
    parser.add_argument("--out_dir", type=Path, required=True, help="data directory")
    parser.add_argument("--seed", type=int, default=0)
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Write as many mixtures as there are clips: each clip with another one.

    Raises:
        DataDirError: a clip without label or part.
    """
    paths = read_table(args.wav_scp, "utterance file")
    labels = read_table(args.source / "labels", "utterance label")
    groups = read_table(args.source / "groups", "utterance group")
    parts = read_table(args.splits, "utterance part")
    rng = np.random.default_rng(args.seed)
    clips_of: dict[str, list[str]] = defaultdict(list)
    for utt in sorted(paths):
        part = parts.get(utt, parts.get(groups.get(utt, "")))
        if utt not in labels or part is None:
            raise DataDirError(f"{args.splits}: no label or part of '{utt}'; add it")
        clips_of[part].append(utt)
    mixtures = []
    folder = args.out_dir / "mixtures"
    folder.mkdir(parents=True, exist_ok=True)
    for part, clips in sorted(clips_of.items()):
        for first in clips:
            others = [utt for utt in clips if labels[utt] != labels[first]]
            if not others:
                continue
            second = others[int(rng.integers(len(others)))]
            utt = f"mix-{first}"
            path = folder / file_name(utt, ".flac")
            samples = to_int16(mix([paths[first], paths[second]], rng))[0]
            soundfile.write(path, samples, SAMPLE_RATE)
            both = " ".join(sorted([labels[first], labels[second]]))
            file = str(path.absolute())
            mixtures.append(Entry(utt, file, utt, "audio", labels=both, part=part))
    write_entries(sorted(mixtures), args.out_dir)
    logging.info("%d mixtures of two", len(mixtures))


if __name__ == "__main__":
    main()

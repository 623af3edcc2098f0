#!/usr/bin/env python3
"""Lay a data directory's clips out as s3prl's downstream voxceleb1 expects them.

``<out>/dev/wav/id<10001 + speaker>/<group>/<utterance>.wav`` and ``splits.txt``: a line
a clip, 1 for training, 2 for development, 3 for the test. A group's clips stay
together; a fifth of the groups each is for development and test, by their hash.
"""

import argparse
import hashlib
import shutil
from pathlib import Path

import soundfile

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.audio import read_audio, to_int16
from espnet2_spear.fileio.datadir import DataDirError, read_table
from espnet2_spear.fileio.explain import command
from espnet2_spear.fileio.names import file_name

FIRST_ID = 10001
TEST, DEV, TRAIN = 3, 2, 1


def split_of(group: str) -> int:
    """Split of a group, always the same."""
    part = int(hashlib.sha256(group.encode()).hexdigest(), 16) % 5
    return TEST if part == 0 else DEV if part == 1 else TRAIN


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wav_scp", type=Path, required=True, help="16 kHz files")
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--groups", type=Path, required=True)
    parser.add_argument("--out_dir", type=Path, required=True, help="made anew")
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Write the layout.

    Raises:
        DataDirError: a clip without label or group, or of another rate.
    """
    labels = read_table(args.labels, "utterance speaker")
    groups = read_table(args.groups, "utterance group")
    speakers = sorted(set(labels.values()))
    shutil.rmtree(args.out_dir, ignore_errors=True)
    lines = []
    for utt, path in read_table(args.wav_scp, "utterance file").items():
        if utt not in labels or utt not in groups:
            raise DataDirError(f"{args.labels}: no label or group of '{utt}'; add it")
        samples, rate = read_audio(path)
        if rate != SAMPLE_RATE:
            raise DataDirError(f"{path}: is at {rate} Hz; run stage 2 of run.sh again")
        speaker = f"id{FIRST_ID + speakers.index(labels[utt])}"
        name = f"{speaker}/{groups[utt]}/{file_name(utt, '.wav')}"
        target = args.out_dir / "dev/wav" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(target, to_int16(samples)[0], rate)
        lines.append(f"{split_of(groups[utt])} {name}\n")
    (args.out_dir / "splits.txt").write_text("".join(lines), encoding="utf-8")
    counts = {n: sum(line.startswith(str(n)) for line in lines) for n in (1, 2, 3)}
    print(f"{len(speakers)} speakers; clips to train, develop, test: {counts}")


if __name__ == "__main__":
    main()

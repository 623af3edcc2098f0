#!/usr/bin/env python3
"""Check transcribed 16 kHz data sets and bring them here (stage 1).

Audio is not copied: the paths in wav.scp are rewritten to hold from this folder.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from espnet2_spear.fileio.datadir import RAW, DataDir, DataDirError


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in_dir", type=Path, required=True)
    parser.add_argument("--out_dir", type=Path, required=True)
    parser.add_argument(
        "--root", type=Path, required=True, help="Paths in wav.scp are relative to it"
    )
    return parser


def main() -> None:
    args = get_parser().parse_args()
    if not (args.in_dir / "wav.scp").exists():
        raise DataDirError(
            f"{args.in_dir}: no such data set; make it with "
            "`cd ../ssl1 && ./run.sh --stop_stage 3`, or set SSL_DATA in db.sh"
        )
    data = DataDir.load(args.in_dir)
    if data.segments is not None:
        raise DataDirError(
            f"{args.in_dir}/segments: cut the audio first (stage 2 of ../ssl1 does)"
        )
    data.validate(require=("text", "utt2num_samples"))
    blank = [utt for utt in data.utterances if not data.text[utt].strip()]
    if blank:
        print(f"{args.in_dir}: {len(blank)} without words left out: {blank}")
        data = data.select(set(data.utterances) - set(blank))
    paths = {
        utt: file if os.path.isabs(file) else os.path.relpath(args.root / file)
        for utt, file in data.wav_scp.items()
    }
    missing = [utt for utt, file in paths.items() if not os.path.exists(file)]
    if missing:
        raise DataDirError(
            f"{args.in_dir}/wav.scp: {len(missing)} files are missing, for example "
            f"{paths[missing[0]]}; format the set again (stage 2 of ../ssl1)"
        )
    replace(data, wav_scp=paths, feats_type=RAW).write(args.out_dir)
    minutes = sum(data.utt2num_samples.values()) / 16000 / 60
    print(f"{args.out_dir}: {len(data.utterances)} utterances, {minutes:.1f} minutes")


if __name__ == "__main__":
    try:
        main()
    except DataDirError as error:
        sys.exit(f"data.py: {error}")

#!/usr/bin/env python3
"""Check transcribed 16 kHz data sets and bring them here (stage 1).

Audio is not copied: the paths in wav.scp are rewritten to hold from this folder. They
name files, or entries of arks of FLAC (file.ark:offset).
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from espnet2_spear.fileio.datadir import RAW, DataDir, DataDirError
from espnet2_spear.fileio.decode import split_ark


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in_dir", type=Path, required=True)
    parser.add_argument("--out_dir", type=Path, required=True)
    parser.add_argument(
        "--root", type=Path, required=True, help="Paths in wav.scp are relative to it"
    )
    return parser


def check_audio(scp: Path, values: list[str]) -> None:
    """Refuse audio that is not there, or that ESPnet cannot read in one way.

    Args:
        scp: whose lines are checked, for messages.
        values: its paths, from this folder.

    Raises:
        DataDirError: such audio.
    """
    found = [split_ark(value) for value in values]
    missing = [
        v for v, (file, _) in zip(values, found, strict=True) if not file.exists()
    ]
    if missing:
        raise DataDirError(
            f"{scp}: {len(missing)} files are missing, for example {missing[0]}; "
            "format the set again (stage 2 of ../ssl1)"
        )
    remedy = "format the set again with --audio_format flac or flac.ark"
    entries = {file: offset for file, offset in found if offset is not None}
    if entries and any(offset is None for _, offset in found):
        raise DataDirError(
            f"{scp}: names files and entries of arks, of which ESPnet reads one kind; "
            f"{remedy}"
        )
    for file, offset in entries.items():
        with file.open("rb") as opened:
            opened.seek(offset)
            if opened.read(4) == b"RIFF":
                raise DataDirError(
                    f"{scp}: {file} holds WAV, which ESPnet reads from arks as 16-bit "
                    f"integers; {remedy}"
                )


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
    check_audio(args.in_dir / "wav.scp", list(paths.values()))
    replace(data, wav_scp=paths, feats_type=RAW).write(args.out_dir)
    minutes = sum(data.utt2num_samples.values()) / 16000 / 60
    print(f"{args.out_dir}: {len(data.utterances)} utterances, {minutes:.1f} minutes")


if __name__ == "__main__":
    try:
        main()
    except DataDirError as error:
        sys.exit(f"data.py: {error}")

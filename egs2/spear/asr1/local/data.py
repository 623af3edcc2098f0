#!/usr/bin/env python3
"""Check transcribed 16 kHz data sets and bring them here (stage 1).

Audio is not copied: the paths in wav.scp are rewritten to hold from this folder. They
name files, or entries of arks of FLAC (file.ark:offset).
"""

import argparse
import os
from pathlib import Path

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.datadir import RAW, DataDirError, entries, write_entries
from espnet2_spear.fileio.decode import split_ark
from espnet2_spear.fileio.explain import command


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


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    if not (args.in_dir / "wav.scp").exists():
        raise DataDirError(
            f"{args.in_dir}: no such data set; make it with "
            "`cd ../ssl1 && ./run.sh --stop_stage 3`, or set SSL_DATA in db.sh"
        )
    if (args.in_dir / "segments").exists():
        raise DataDirError(
            f"{args.in_dir}/segments: cut the audio first (stage 2 of ../ssl1 does)"
        )
    kept, blank = [], []
    for entry in entries(args.in_dir, require=("text", "utt2num_samples")):
        if not entry.text.strip():
            blank.append(entry.utt)
            continue
        if not os.path.isabs(entry.path):
            entry = entry._replace(path=os.path.relpath(args.root / entry.path))
        kept.append(entry)
    if blank:
        print(f"{args.in_dir}: {len(blank)} without words left out: {blank}")
    check_audio(args.in_dir / "wav.scp", [entry.path for entry in kept])
    write_entries(kept, args.out_dir, RAW)
    minutes = sum(entry.samples for entry in kept) / SAMPLE_RATE / 60
    print(f"{args.out_dir}: {len(kept)} utterances, {minutes:.1f} minutes")


if __name__ == "__main__":
    main()

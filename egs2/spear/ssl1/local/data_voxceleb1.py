#!/usr/bin/env python3
"""Prepare VoxCeleb1 with its split for speaker identification."""

from pathlib import Path

from corpus import Corpus, Found, list_lines

from espnet2_spear.fileio.datadir import DataDirError

NUMBERS = {"1": "train", "2": "valid", "3": "test"}


def read(root: Path, part: str, found: Found) -> None:
    """Read a part; the label is the speaker."""
    listing = root / "iden_split.txt"
    for line in map(str.strip, list_lines(listing)):
        number, _, name = line.partition(" ")
        if number not in NUMBERS or name.count("/") != 2:
            raise DataDirError(
                f"{listing}: expected '1|2|3 speaker/video/n.wav', found {line!r}; "
                "fetch the file again"
            )
        if NUMBERS[number] == part:
            speaker, video, file = name.split("/")
            utt = f"voxceleb1-{speaker}-{video}-{Path(file).stem}"
            path = root / "wav" / name
            found.add(utt, path, "speech", f"voxceleb1-{speaker}", labels=speaker)


CORPUS = Corpus(
    name="voxceleb1",
    read=read,
    parts={"train": 138361, "valid": 8251, "test": 6904},
    default_parts=("train",),
    licence="metadata CC BY 4.0; the audio remains its owners'",
    source="https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html",
    layout="wav/<speaker>/<video>/<n>.wav (dev and test together) and iden_split.txt",
)

if __name__ == "__main__":
    CORPUS.main()

#!/usr/bin/env python3
"""Prepare VGGSound: clips of 10 s that users cut from the videos themselves."""

from pathlib import Path

from corpus import Corpus, FileIndex, Found, needed, read_csv

LAYOUT = "vggsound.csv as published, and audio/ with files named ID_START (in 6 digits)"
FIELDS = ("video", "start", "label", "split")


def read(root: Path, part: str) -> Found:
    """Read a part; the label is the class, with _ for spaces."""
    folder = needed(root / "audio", LAYOUT)
    files = FileIndex(folder)
    found = Found()
    for row in read_csv(needed(root / "vggsound.csv", LAYOUT), FIELDS):
        if row["split"] == part:
            name = f"{row['video']}_{int(row['start']):06d}"
            label = "_".join(row["label"].replace(",", " ").split())
            path = files.find(name) or folder / f"{name}.wav"
            found.add(f"vggsound-{name}", path, "audio", labels=label)
    return found


CORPUS = Corpus(
    name="vggsound",
    read=read,
    parts={"train": None, "test": None},
    default_parts=("train",),
    licence="annotations CC BY 4.0; the audio remains its owners'",
    source="https://www.robots.ox.ac.uk/~vgg/data/vggsound/",
    layout=LAYOUT,
    incomplete=True,
)

if __name__ == "__main__":
    CORPUS.command()

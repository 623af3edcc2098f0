#!/usr/bin/env python3
"""Prepare VGGSound: clips of 10 s that users cut from the videos themselves."""

from pathlib import Path

from corpus import Corpus, FileIndex, Found, label, read_csv

FIELDS = ("video", "start", "label", "split")


def read(root: Path, part: str, found: Found) -> None:
    """Read a part; the label is the class, with _ for spaces."""
    files = FileIndex(root / "audio")
    for row in read_csv(root / "vggsound.csv", FIELDS):
        if row["split"] == part:
            name = f"{row['video']}_{int(row['start']):06d}"
            path = files.path(name, ".wav")
            found.add(f"vggsound-{name}", path, "audio", labels=label(row["label"]))


CORPUS = Corpus(
    name="vggsound",
    read=read,
    parts={"train": None, "test": None},
    default_parts=("train",),
    licence="annotations CC BY 4.0; the audio remains its owners'",
    source="https://www.robots.ox.ac.uk/~vgg/data/vggsound/",
    layout="vggsound.csv as published, and audio/ with files named ID_START (6 digits)",
    incomplete=True,
)

if __name__ == "__main__":
    CORPUS.main()

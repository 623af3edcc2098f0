#!/usr/bin/env python3
"""Prepare BBC sound effects."""

from pathlib import Path

from corpus import Corpus, FileIndex, Found, needed, read_csv

LAYOUT = "BBCSoundEffects.csv as published, and audio/ with the files it names"


def read(root: Path, part: str) -> Found:
    """Read all clips; the label is the category, with _ for spaces."""
    folder = needed(root / "audio", LAYOUT)
    files = FileIndex(folder)
    found = Found()
    for row in read_csv(needed(root / "BBCSoundEffects.csv", LAYOUT)):
        name = Path(row["location"]).stem
        label = "_".join(row["category"].replace(",", " ").split())
        path = files.find(name) or folder / row["location"]
        found.add(f"bbc_sfx-{name}", path, "audio", labels=label)
    return found


CORPUS = Corpus(
    name="bbc_sfx",
    read=read,
    parts={"all": None},
    default_parts=("all",),
    licence="RemArc: personal use, education, research",
    source="https://sound-effects.bbcrewind.co.uk",
    layout=LAYOUT,
    incomplete=True,
)

if __name__ == "__main__":
    CORPUS.command()

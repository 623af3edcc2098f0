#!/usr/bin/env python3
"""Prepare BBC sound effects."""

from pathlib import Path

from corpus import Corpus, FileIndex, Found, label, read_csv


def read(root: Path, part: str, found: Found) -> None:
    """Read all clips; the label is the category, with _ for spaces."""
    files = FileIndex(root / "audio")
    for row in read_csv(root / "BBCSoundEffects.csv"):
        name = Path(row["location"]).stem
        path = files.path(name, ".wav")
        found.add(f"bbc_sfx-{name}", path, "audio", labels=label(row["category"]))


CORPUS = Corpus(
    name="bbc_sfx",
    read=read,
    parts={"all": None},
    licence="RemArc: personal use, education, research",
    source="https://sound-effects.bbcrewind.co.uk",
    layout="BBCSoundEffects.csv as published, and audio/ with the files it names",
    incomplete=True,
)

if __name__ == "__main__":
    CORPUS.main()

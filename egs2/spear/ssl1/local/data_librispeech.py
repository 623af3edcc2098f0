#!/usr/bin/env python3
"""Prepare LibriSpeech."""

from pathlib import Path

from corpus import Corpus, Found, needed

from espnet2_spear.fileio.tables import open_text

LAYOUT = "<part>/<speaker>/<chapter>/*.flac and *.trans.txt (or LibriSpeech/<part>/...)"


def read(root: Path, part: str) -> Found:
    """Read a part; transcripts are upper case without punctuation, as published."""
    folder = root / part
    if not folder.exists():
        folder = needed(root / "LibriSpeech" / part, LAYOUT)
    found = Found()
    for listing in sorted(folder.glob("*/*/*.trans.txt")):
        with open_text(listing) as file:
            lines = file.read().splitlines()
        for line in lines:
            name, _, text = line.partition(" ")
            speaker, chapter, _ = name.split("-")
            found.add(
                f"librispeech-{name}",
                listing.with_name(f"{name}.flac"),
                "speech",
                f"librispeech-{speaker}-{chapter}",
                text,
            )
    return found


CORPUS = Corpus(
    name="librispeech",
    read=read,
    parts={
        "train-clean-100": 28539,
        "train-clean-360": 104014,
        "train-other-500": 148688,
        "dev-clean": 2703,
        "dev-other": 2864,
        "test-clean": 2620,
        "test-other": 2939,
    },
    default_parts=("train-clean-100", "train-clean-360", "train-other-500"),
    licence="CC BY 4.0",
    source="https://www.openslr.org/12",
    layout=LAYOUT,
)

if __name__ == "__main__":
    CORPUS.command()

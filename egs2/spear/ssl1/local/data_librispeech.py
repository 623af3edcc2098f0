#!/usr/bin/env python3
"""Prepare LibriSpeech."""

from pathlib import Path

from corpus import Corpus, Found, list_lines


def read(root: Path, part: str, found: Found) -> None:
    """Read a part; transcripts are upper case without punctuation, as published."""
    folder = root if (root / part).exists() else root / "LibriSpeech"
    for listing in sorted((folder / part).glob("*/*/*.trans.txt")):
        for line in list_lines(listing):
            name, _, text = line.strip().partition(" ")
            speaker, chapter, _ = name.split("-")
            found.add(
                f"librispeech-{name}",
                listing.with_name(f"{name}.flac"),
                "speech",
                f"librispeech-{speaker}-{chapter}",
                text,
            )


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
    layout="<part>/<speaker>/<chapter>/*.flac and *.trans.txt, here or in LibriSpeech/",
)

if __name__ == "__main__":
    CORPUS.main()

#!/usr/bin/env python3
"""Prepare ESC-50: environmental sounds of 50 classes in five folds."""

from pathlib import Path

from corpus import Corpus, Found, read_csv


def read(root: Path, part: str, found: Found) -> None:
    """Read a fold; the label is the category."""
    for row in read_csv(root / "meta/esc50.csv"):
        if f"fold{row['fold']}" == part:
            path = root / "audio" / row["filename"]
            found.add(f"esc50-{path.stem}", path, "audio", labels=row["category"])


CORPUS = Corpus(
    name="esc50",
    read=read,
    parts=dict.fromkeys([f"fold{number}" for number in range(1, 6)], 400),
    licence="CC BY-NC 3.0",
    source="https://github.com/karolpiczak/ESC-50",
    layout="meta/esc50.csv and audio/*.wav",
)

if __name__ == "__main__":
    CORPUS.main()

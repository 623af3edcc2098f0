#!/usr/bin/env python3
"""Prepare MUSAN: music, speech and noise."""

from pathlib import Path

from corpus import Corpus, Found, audio_files


def read(root: Path, part: str, found: Found) -> None:
    """Read a part; its speech is of domain speech."""
    folder = root / part if (root / part).exists() else root / "musan" / part
    for path in audio_files(folder):
        domain = "speech" if part == "speech" else "audio"
        found.add(f"musan-{path.stem}", path, domain, labels=part)


CORPUS = Corpus(
    name="musan",
    read=read,
    parts={"music": 660, "speech": 426, "noise": 930},
    default_parts=("music", "noise"),
    licence="CC BY 4.0",
    source="https://www.openslr.org/17",
    layout="{music,speech,noise}/<source>/*.wav (or musan/...)",
)

if __name__ == "__main__":
    CORPUS.main()

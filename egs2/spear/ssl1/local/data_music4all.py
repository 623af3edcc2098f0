#!/usr/bin/env python3
"""Prepare Music4All: clips of 30 s, with genres."""

from pathlib import Path

from corpus import Corpus, FileIndex, Found, label, read_csv


def read(root: Path, part: str, found: Found) -> None:
    """Read all clips; labels are genres, with _ for spaces."""
    files = FileIndex(root / "audios")
    for row in read_csv(root / "id_genres.csv", delimiter="\t"):
        name, genres = row["id"], map(label, row["genres"].split(","))
        path = files.path(name, ".mp3")
        found.add(f"music4all-{name}", path, "audio", labels=" ".join(genres))


CORPUS = Corpus(
    name="music4all",
    read=read,
    parts={"all": 109269},
    licence="for research, on request; the music remains its owners'",
    source="https://sites.google.com/view/contact4music4all",
    layout="id_genres.csv as published (columns separated by tabs), and audios/ID.mp3",
)

if __name__ == "__main__":
    CORPUS.main()

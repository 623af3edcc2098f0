#!/usr/bin/env python3
"""Prepare Music4All: clips of 30 s, with genres."""

import csv
from pathlib import Path

from corpus import Corpus, FileIndex, Found, needed

from espnet2_spear.fileio.tables import open_text

LAYOUT = "id_genres.csv as published (columns separated by tabs), and audios/ID.mp3"


def read(root: Path, part: str) -> Found:
    """Read all clips; labels are genres, with _ for spaces."""
    folder = needed(root / "audios", LAYOUT)
    files = FileIndex(folder)
    found = Found()
    listing = needed(root / "id_genres.csv", LAYOUT)
    with open_text(listing, newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            name = row["id"]
            genres = ["_".join(g.split()) for g in row["genres"].split(",")]
            path = files.find(name) or folder / f"{name}.mp3"
            found.add(f"music4all-{name}", path, "audio", labels=" ".join(genres))
    return found


CORPUS = Corpus(
    name="music4all",
    read=read,
    parts={"all": 109269},
    default_parts=("all",),
    licence="for research, on request; the music remains its owners'",
    source="https://sites.google.com/view/contact4music4all",
    layout=LAYOUT,
)

if __name__ == "__main__":
    CORPUS.command()

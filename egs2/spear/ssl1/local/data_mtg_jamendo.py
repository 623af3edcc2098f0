#!/usr/bin/env python3
"""Prepare MTG-Jamendo: full tracks, with tags."""

from itertools import islice
from pathlib import Path

from corpus import Corpus, Found, list_lines

from espnet2_spear.fileio.datadir import DataDirError

FIXED = 5  # columns before the tags: track, artist, album, path, duration


def read(root: Path, part: str, found: Found) -> None:
    """Read a part; the speaker is the artist, labels are tags such as genre---rock."""
    name = "raw_30s" if part == "all" else f"splits/split-0/autotagging-{part}"
    listing = root / f"data/{name}.tsv"
    folders = [folder for folder in (root / "audio", root) if folder.is_dir()]
    for line in islice(list_lines(listing), 1, None):
        columns = line.rstrip("\r\n").split("\t")
        if len(columns) < FIXED:
            raise DataDirError(f"{listing}: {line!r} has too few columns")
        track, artist, _, relative = columns[:4]
        short = Path(relative).with_suffix(".low.mp3")
        paths = [folder / name for folder in folders for name in (relative, short)]
        path = next((path for path in paths if path.is_file()), paths[0])
        labels = " ".join(columns[FIXED:])
        utt = f"mtg_jamendo-{track}"
        found.add(utt, path, "audio", speaker=f"mtg_jamendo-{artist}", labels=labels)


CORPUS = Corpus(
    name="mtg_jamendo",
    read=read,
    parts={"all": 55701, "train": None, "validation": None, "test": None},
    default_parts=("all",),
    licence="Creative Commons, by track",
    source="https://github.com/MTG/mtg-jamendo-dataset",
    layout="data/raw_30s.tsv (part all) and data/splits/split-0/autotagging-<part>.tsv "
    "of the repository, and the audio as NN/ID.mp3 or NN/ID.low.mp3, here or in audio/",
)

if __name__ == "__main__":
    CORPUS.main()

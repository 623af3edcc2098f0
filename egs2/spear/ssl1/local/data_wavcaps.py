#!/usr/bin/env python3
"""Prepare WavCaps: captioned clips of Freesound and others, in flac."""

import json
from pathlib import Path

from corpus import Corpus, FileIndex, Found, needed

from espnet2_spear.fileio.datadir import DataDirError

LAYOUT = (
    "json_files/FreeSound/fsd_final.json (and BBC_Sound_Effects/bbc_final.json, "
    "SoundBible/sb_final.json), and the unpacked audio with files named ID.flac in "
    "audio/<part>/"
)
LISTS = {
    "freesound": "FreeSound/fsd_final.json",
    "bbc": "BBC_Sound_Effects/bbc_final.json",
    "soundbible": "SoundBible/sb_final.json",
}


def read(root: Path, part: str) -> Found:
    """Read a part."""
    listing = needed(root / "json_files" / LISTS[part], LAYOUT)
    folder = needed(root / "audio" / part, LAYOUT)
    files = FileIndex(folder)
    found = Found()
    try:
        ids = [str(entry["id"]) for entry in json.loads(listing.read_text())["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataDirError(f"{listing}: malformed ({error}); fetch it again") from None
    for name in ids:
        path = files.find(name) or folder / f"{name}.flac"
        found.add(f"wavcaps-{part}-{name}", path, "audio")
    return found


CORPUS = Corpus(
    name="wavcaps",
    read=read,
    parts={"freesound": 262300, "bbc": 31201, "soundbible": 1232},
    default_parts=("freesound",),
    licence="for academic use; the clips keep their own licences",
    source="https://huggingface.co/datasets/cvssp/WavCaps",
    layout=LAYOUT,
    incomplete=True,
)

if __name__ == "__main__":
    CORPUS.command()

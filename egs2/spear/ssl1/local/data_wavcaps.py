#!/usr/bin/env python3
"""Prepare WavCaps: captioned clips of Freesound and others, in flac."""

import json
from pathlib import Path

from corpus import Corpus, FileIndex, Found

from espnet2_spear.fileio.datadir import DataDirError

LISTS = {
    "freesound": "FreeSound/fsd_final.json",
    "bbc": "BBC_Sound_Effects/bbc_final.json",
    "soundbible": "SoundBible/sb_final.json",
}


def read(root: Path, part: str, found: Found) -> None:
    """Read a part."""
    listing = root / "json_files" / LISTS[part]
    files = FileIndex(root / "audio" / part)
    try:
        ids = [str(entry["id"]) for entry in json.loads(listing.read_text())["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataDirError(f"{listing}: malformed ({error}); fetch it again") from None
    for name in ids:
        found.add(f"wavcaps-{part}-{name}", files.path(name, ".flac"), "audio")


CORPUS = Corpus(
    name="wavcaps",
    read=read,
    parts={"freesound": 262300, "bbc": 31201, "soundbible": 1232},
    default_parts=("freesound",),
    licence="for academic use; the clips keep their own licences",
    source="https://huggingface.co/datasets/cvssp/WavCaps",
    layout="json_files/FreeSound/fsd_final.json (and BBC_Sound_Effects/bbc_final.json, "
    "SoundBible/sb_final.json), and the unpacked audio with files named ID.flac in "
    "audio/<part>/",
    incomplete=True,
)

if __name__ == "__main__":
    CORPUS.main()

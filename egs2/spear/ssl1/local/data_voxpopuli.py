#!/usr/bin/env python3
"""Prepare VoxPopuli's unlabelled part: segments of recordings of the parliament.

A part is a language of version 2 (such as en_v2, the paper's), read from the raw
recordings and the published list of segments; nothing has to be cut to files before.
"""

from pathlib import Path

from corpus import Corpus, Found, read_csv

from espnet2_spear.fileio.datadir import Segment

LANGUAGES = (
    "bg cs da de el en es et fi fr hr hu it lt lv mt nl pl pt ro sk sl sv".split()
)


def read(root: Path, part: str, found: Found) -> None:
    """Read a language: all events (version 2), or plenary sessions (version 1)."""
    lang, _, version = part.partition("_")
    listing = root / "unlabelled_data/unlabelled_v2.tsv.gz"
    for row in read_csv(listing, delimiter="\t"):
        event = row["event_id"]
        of_version = version == "v2" or "PLENARY" in event
        if not event.endswith(f"_{lang}") or not of_version:
            continue
        recording = f"voxpopuli-{event}"
        path = root / "raw_audios" / lang / event[:4] / f"{event}.ogg"
        utt = f"{recording}_{row['segment_no']}"
        segment = Segment(recording, float(row["start"]), float(row["end"]))
        found.add_segment(utt, path, segment, recording)


CORPUS = Corpus(
    name="voxpopuli",
    read=read,
    parts=dict.fromkeys([*LANGUAGES, *(f"{lang}_v2" for lang in LANGUAGES)]),
    default_parts=("en_v2",),
    hours={"en_v2": 24151},  # as SPEAR's authors counted its 3.06 million segments
    licence="CC0; see the European Parliament's legal notice for the recordings",
    source="https://github.com/facebookresearch/voxpopuli",
    layout="raw_audios/<language>/<year>/EVENT.ogg, and unlabelled_data/"
    "unlabelled_v2.tsv.gz as published",
)

if __name__ == "__main__":
    CORPUS.main()

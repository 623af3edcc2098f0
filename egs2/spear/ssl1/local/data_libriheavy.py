#!/usr/bin/env python3
"""Prepare LibriHeavy: transcribed segments of the recordings of Libri-Light."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corpus import Corpus, Found, list_lines

from espnet2_spear.fileio.datadir import DataDirError, Segment


def cuts(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a manifest.

    Raises:
        DataDirError: the file is cut off or malformed.
    """
    for number, line in enumerate(list_lines(path), 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise DataDirError(
                f"{path}: broken at line {number} ({error}); fetch it again"
            ) from None


def read(root: Path, part: str, found: Found) -> None:
    """Read a part; the text is the book's, with case and punctuation."""
    for cut in cuts(root / f"libriheavy_cuts_{part}.jsonl.gz"):
        (supervision,) = cut["supervisions"]
        name = supervision["recording_id"]
        path = root / f"{name}.flac"
        recording = f"libriheavy-{name.replace('/', '-')}"
        utt = f"libriheavy-{cut['id'].replace('/', '-')}"
        start = float(cut["start"])
        end = start + float(cut["duration"])
        speaker = f"libriheavy-{supervision['speaker']}"
        text = " ".join(supervision["custom"]["texts"][0].split())
        found.add_segment(utt, path, Segment(recording, start, end), speaker, text)


PARTS = ("small", "medium", "large", "dev", "test_clean", "test_other")
PARTS += ("test_clean_large", "test_other_large")
CORPUS = Corpus(
    name="libriheavy",
    read=read,
    parts=dict.fromkeys(PARTS),
    default_parts=("small", "medium", "large"),
    # The paper has subsets of 500, 5000 and 50 000 hours, each with the smaller ones;
    # of the manifests none has what is in another.
    hours={"small": 500, "medium": 4500, "large": 45000},
    licence="public domain; the manifests Apache-2.0",
    source="https://github.com/k2-fsa/libriheavy",
    layout="libriheavy_cuts_<part>.jsonl.gz as published, and Libri-Light's folders "
    "small, medium, large (or links to them)",
)

if __name__ == "__main__":
    CORPUS.main()

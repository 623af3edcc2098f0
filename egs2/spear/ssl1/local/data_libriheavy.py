#!/usr/bin/env python3
"""Prepare LibriHeavy: transcribed segments of the recordings of Libri-Light."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corpus import Corpus, Found, needed

from espnet2_spear.fileio.datadir import DataDirError, Segment

LAYOUT = (
    "libriheavy_cuts_<part>.jsonl.gz as published, and Libri-Light's folders small, "
    "medium, large (or links to them)"
)


def cuts(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a manifest.

    Raises:
        DataDirError: the file is cut off or malformed.
    """
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                number += 1
                yield json.loads(line)
    except (EOFError, OSError, ValueError) as error:
        raise DataDirError(
            f"{path}: broken at line {number + 1} ({error}); fetch it again"
        ) from None


def read(root: Path, part: str) -> Found:
    """Read a part; the text is the book's, with case and punctuation."""
    found = Found()
    found.data.segments = {}
    absent: set[str] = set()
    for cut in cuts(needed(root / f"libriheavy_cuts_{part}.jsonl.gz", LAYOUT)):
        (supervision,) = cut["supervisions"]
        name = supervision["recording_id"]
        path = root / f"{name}.flac"
        recording = f"libriheavy-{name.replace('/', '-')}"
        if recording not in found.data.wav_scp:
            if name in absent:
                continue
            if not path.is_file():
                absent.add(name)
                found.missing.append(str(path))
                continue
            found.data.wav_scp[recording] = str(path.absolute())
        utt = f"libriheavy-{cut['id'].replace('/', '-')}"
        start = float(cut["start"])
        end = start + float(cut["duration"])
        found.data.segments[utt] = Segment(recording, start, end)
        found.data.utt2spk[utt] = f"libriheavy-{supervision['speaker']}"
        found.data.utt2domain[utt] = "speech"
        text = " ".join(supervision["custom"]["texts"][0].split())
        if text:
            found.data.text[utt] = text
    return found


PARTS = ("small", "medium", "large", "dev", "test_clean", "test_other")
PARTS += ("test_clean_large", "test_other_large")
CORPUS = Corpus(
    name="libriheavy",
    read=read,
    parts=dict.fromkeys(PARTS),
    default_parts=("small", "medium", "large"),
    licence="public domain; the manifests Apache-2.0",
    source="https://github.com/k2-fsa/libriheavy",
    layout=LAYOUT,
)

if __name__ == "__main__":
    CORPUS.main()

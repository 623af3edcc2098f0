#!/usr/bin/env python3
"""Prepare GigaSpeech: segments of long recordings."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corpus import Corpus, Found

from espnet2_spear.fileio.datadir import DataDirError, Segment
from espnet2_spear.fileio.tables import open_text

TAGS = re.compile(r"<(COMMA|PERIOD|QUESTIONMARK|EXCLAMATIONPOINT)>")
NO_SPEECH = re.compile(r"<(SIL|MUSIC|NOISE|OTHER)>")
BLOCK = 1 << 20


def recordings(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of "audios" one by one: the file can be larger than memory.

    Raises:
        DataDirError: the file is cut off, of another form, or no UTF-8.
    """
    decoder = json.JSONDecoder()
    with open_text(path) as file:
        text = ""
        while not (start := re.search(r'"audios"\s*:\s*\[', text)):
            block = file.read(BLOCK)
            if not block:
                raise DataDirError(f'{path}: has no list "audios"; fetch it again')
            text += block
        text = text[start.end() :]
        while True:
            text = text.lstrip(" \t\r\n,")
            if text.startswith("]"):
                return
            try:
                entry, end = decoder.raw_decode(text)
            except ValueError:
                block = file.read(BLOCK)
                if not block:
                    raise DataDirError(
                        f"{path}: is cut off or malformed near {text[:60]!r}; fetch it "
                        "again"
                    ) from None
                text += block
                continue
            yield entry
            text = text[end:]


def read(root: Path, part: str, found: Found) -> None:
    """Read a subset; segments without speech are left out."""
    for entry in recordings(root / "GigaSpeech.json"):
        chosen = [s for s in entry["segments"] if f"{{{part}}}" in s["subsets"]]
        chosen = [s for s in chosen if not NO_SPEECH.search(s["text_tn"])]
        path = root / entry["path"]
        recording = f"gigaspeech-{part}-{entry['aid']}"
        for segment in chosen:
            utt = f"gigaspeech-{part}-{segment['sid']}"
            times = float(segment["begin_time"]), float(segment["end_time"])
            text = " ".join(TAGS.sub(" ", segment["text_tn"]).split())
            found.add_segment(utt, path, Segment(recording, *times), recording, text)


CORPUS = Corpus(
    name="gigaspeech",
    read=read,
    parts=dict.fromkeys(("XL", "L", "M", "S", "XS", "DEV", "TEST")),
    default_parts=("XL",),
    hours={"XL": 10000, "L": 2500, "M": 1000, "S": 250, "XS": 10},  # its paper's
    licence="Apache-2.0 metadata; the audio for research, by its terms of access",
    source="https://github.com/SpeechColab/GigaSpeech",
    layout="GigaSpeech.json and the audio folder that it names (audio/.../*.opus)",
)

if __name__ == "__main__":
    CORPUS.main()

#!/usr/bin/env python3
"""Prepare Libri-Light: its long recordings in segments of voice activity."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from corpus import Corpus, Found

from espnet2_spear.fileio.datadir import DataDirError, Segment

MAX_SECONDS = 30.0  # of a segment; a longer stretch without pause is cut in stage 1
MAX_PAUSE = 2.0  # seconds; a longer one always ends a segment


def join(activity: Iterable[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Join stretches of voice activity, in seconds, to segments."""
    start = end = None
    for first, last in activity:
        if start is not None and (
            first - end > MAX_PAUSE or last - start > MAX_SECONDS
        ):
            yield start, end
            start = None
        if start is None:
            start = first
        end = last
    if start is not None:
        yield start, end


def voice_activity(path: Path) -> list[tuple[float, float]]:
    """Read the stretches of a recording's JSON file; none where it has none.

    Raises:
        DataDirError: the file is malformed.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [(float(a), float(b)) for a, b in content.get("voice_activity", ())]
    except (ValueError, TypeError, AttributeError) as error:
        raise DataDirError(f"{path}: malformed ({error}); fetch it again") from None


def read(root: Path, part: str, found: Found) -> None:
    """Read a part; a recording without voice activity is one segment."""
    for path in (root / part).glob("*/*/*.json"):
        audio = path.with_suffix(".flac")
        speaker, book = path.parts[-3:-1]
        recording = f"librilight-{part}-{speaker}-{book}-{path.stem}"
        spans = list(join(voice_activity(path))) or [(0.0, -1.0)]
        for number, (start, end) in enumerate(spans):
            utt = f"{recording}_{number:05d}"
            segment = Segment(recording, start, end)
            found.add_segment(utt, audio, segment, f"librilight-{speaker}")


CORPUS = Corpus(
    name="librilight",
    read=read,
    parts=dict.fromkeys(("small", "medium", "large", "duplicate")),
    default_parts=("small", "medium", "large"),
    licence="public domain",
    source="https://github.com/facebookresearch/libri-light",
    layout="small, medium, large, duplicate: <part>/SPEAKER/BOOK/NAME.{flac,json}",
)

if __name__ == "__main__":
    CORPUS.main()

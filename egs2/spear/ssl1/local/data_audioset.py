#!/usr/bin/env python3
"""Prepare AudioSet: clips of 10 s that users cut from the videos themselves."""

from pathlib import Path

from corpus import Corpus, FileIndex, Found, read_csv

FIELDS = ("YTID", "start_seconds", "end_seconds", "positive_labels")


def names(video: str, start: float) -> list[str]:
    """Names that tools give a clip, without suffix."""
    stems = [video, f"{video}_{start:.0f}", f"{video}_{start * 1000:.0f}"]
    return stems + [f"Y{stem}" for stem in stems]


def read(root: Path, part: str, found: Found) -> None:
    """Read a part; labels are AudioSet's ids (such as /m/09x0r)."""
    files = FileIndex(root / "audio" / part)
    for row in read_csv(root / f"{part}_segments.csv", FIELDS):
        video, start = row["YTID"], float(row["start_seconds"])
        paths = filter(None, map(files.find, names(video, start)))
        path = next(paths, files.folder / f"{video}.wav")
        labels = row["positive_labels"].replace(",", " ")
        found.add(f"audioset-{part}-{video}", path, "audio", labels=labels)


CORPUS = Corpus(
    name="audioset",
    read=read,
    parts={"balanced_train": 22160, "unbalanced_train": 2041789, "eval": 20371},
    default_parts=("balanced_train", "unbalanced_train"),
    licence="labels CC BY 4.0; the audio remains its owners'",
    source="https://research.google.com/audioset/download.html",
    layout="<part>_segments.csv as published, and audio/<part>/ with files named by "
    "the video's id (ID, YID, or either followed by _START in s or ms)",
    incomplete=True,
)

if __name__ == "__main__":
    CORPUS.main()

#!/usr/bin/env python3
"""Prepare FSD50K: sound events of 200 classes, several a clip."""

from pathlib import Path

from corpus import Corpus, Found, read_csv


def read(root: Path, part: str, found: Found) -> None:
    """Read a part; labels are the names of the vocabulary."""
    group = "eval" if part == "eval" else "dev"
    for row in read_csv(root / f"FSD50K.ground_truth/{group}.csv"):
        if row.get("split", "eval") == part:
            path = root / f"FSD50K.{group}_audio" / f"{row['fname']}.wav"
            labels = row["labels"].replace(",", " ")
            found.add(f"fsd50k-{row['fname']}", path, "audio", labels=labels)


CORPUS = Corpus(
    name="fsd50k",
    read=read,
    parts={"train": 36796, "val": 4170, "eval": 10231},
    default_parts=("train", "val"),
    licence="CC BY 4.0; single clips CC0, CC BY, CC BY-NC or CC Sampling+",
    source="https://zenodo.org/records/4060432",
    layout="FSD50K.dev_audio/*.wav, FSD50K.eval_audio/*.wav and "
    "FSD50K.ground_truth/{dev,eval}.csv",
)

if __name__ == "__main__":
    CORPUS.main()

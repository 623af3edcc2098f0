#!/usr/bin/env python3
"""Prepare Fisher English: telephone conversations, a channel a speaker."""

import re
from collections.abc import Iterator
from pathlib import Path

from corpus import Corpus, Found, list_lines

from espnet2_spear.fileio.datadir import DataDirError, Segment
from espnet2_spear.fileio.folders import files_below

LAST_OF_P1, LAST = 5850, 11699  # conversations: p1 has the first ones, p2 the others
LINE = re.compile(r"([0-9.]+) ([0-9.]+) ([AB]):\s*(.*)")
SUFFIXES = {".sph", ".wav", ".flac"}
# A start that lacks a digit, as lhotse corrects it, too.
CORRECTIONS = {("fe_03_11487", "31.09 234.06 B:"): "231.09 234.06 B:"}


def turns(path: Path) -> Iterator[tuple[float, float, str, str]]:
    """Yield start and end in seconds, side (A or B) and text of a transcript.

    Raises:
        DataDirError: a line of another form, or no UTF-8.
    """
    for number, line in enumerate(list_lines(path), 1):
        if not line.strip() or line.startswith("#"):
            continue
        text = line.strip()
        for (stem, wrong), right in CORRECTIONS.items():
            if path.stem == stem and text.startswith(wrong):
                text = right + text.removeprefix(wrong)
        match = LINE.fullmatch(text)
        if match is None:
            raise DataDirError(
                f"{path}, line {number}: {line.strip()!r} is not 'start end A:'"
            )
        yield float(match[1]), float(match[2]), match[3], match[4]


def read(root: Path, part: str, found: Found) -> None:
    """Read a part: the turns of both speakers, without what was not understood."""

    def of_part(path: Path) -> bool:
        match = re.fullmatch(r"fe_03_(\d{5})", path.stem)
        return match is not None and (int(match[1]) <= LAST_OF_P1) == (part == "p1")

    # LDC's discs may be linked folders.
    found_files = [*files_below(root, lambda name: name.startswith("fe_03_"))]
    files = {p.stem: p for p in found_files if p.suffix in SUFFIXES}
    # Of copies that have them twice, one.
    transcripts = {p.stem: p for p in found_files if p.suffix == ".txt" and of_part(p)}
    for _, path in sorted(transcripts.items()):
        seen = set()  # fe_03_11587 has a turn twice
        recording = f"fisher-{path.stem}"
        if path.stem not in files:
            found.miss(f"{path.stem}.sph")
            continue
        found.recordings += 1
        for start, end, side, text in turns(path):
            if "((" in text or end <= start:
                continue
            utt = f"{recording}-{side}-{round(start * 100):06d}-{round(end * 100):06d}"
            if utt in seen:
                continue
            seen.add(utt)
            segment = Segment(recording, start, end, channel="AB".index(side))
            words = " ".join(re.sub(r"\[[^]]*\]", " ", text).split())
            file, speaker = files[path.stem], f"{recording}-{side}"
            found.add_segment(utt, file, segment, speaker, words)


CORPUS = Corpus(
    name="fisher",
    read=read,
    parts={"p1": None, "p2": None},
    recordings={"p1": LAST_OF_P1, "p2": LAST - LAST_OF_P1},
    licence="LDC user agreement",
    source="https://catalog.ldc.upenn.edu/LDC2004S13",
    layout="the unpacked LDC discs: audio/NNN/fe_03_NNNNN.{sph,wav,flac} and "
    "trans/NNN/fe_03_NNNNN.txt at any depth (LDC2004S13 and LDC2004T19 are part p1, "
    "LDC2005S13 and LDC2005T19 p2)",
)

if __name__ == "__main__":
    CORPUS.main()

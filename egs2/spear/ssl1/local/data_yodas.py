#!/usr/bin/env python3
"""Prepare YODAS: utterances of videos, in shards of a language.

A part is a shard, such as en000 (manual captions) or en100 (automatic ones), with its
archives unpacked; of other languages any that is there. Granary's selection of it comes
as manifests: give those as `manifest` in the list of corpora (data_corpora.py).
"""

from pathlib import Path

from corpus import Corpus, FileIndex, Found

from espnet2_spear.fileio.datadir import read_table


def read(root: Path, part: str, found: Found) -> None:
    """Read a shard; the texts name its utterances."""
    for path in sorted((root / "data" / part / "text").glob("*.txt")):
        files = FileIndex(root / "data" / part / "audio" / path.stem)
        for name, text in read_table(path, "utterance text", empty_values=True).items():
            file = files.path(name, ".wav")
            found.add(f"yodas-{part}-{name}", file, "speech", text=text)


CORPUS = Corpus(
    name="yodas",
    read=read,
    parts=dict.fromkeys(f"en{n:03d}" for n in (*range(6), *range(100, 128))),
    more_parts=r"[a-z]{2,3}[01]\d\d",
    default_parts=("en000",),
    licence="CC BY 3.0",
    source="https://huggingface.co/datasets/espnet/yodas",
    layout="data/<part>/audio/NNNNNNNN/UTTERANCE.wav and data/<part>/text/NNNNNNNN.txt",
    incomplete=True,
)

if __name__ == "__main__":
    CORPUS.main()

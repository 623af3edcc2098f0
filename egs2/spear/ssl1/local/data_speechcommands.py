#!/usr/bin/env python3
"""Prepare Speech Commands, version 0.02: 35 words."""

from pathlib import Path

from corpus import Corpus, Found, audio_files, list_lines

LISTS = {"valid": "validation_list.txt", "test": "testing_list.txt"}


def read(root: Path, part: str, found: Found) -> None:
    """Read a part; the label, and the text in upper case, is the word."""
    listed = {
        name: "".join(list_lines(root / file)).split() for name, file in LISTS.items()
    }
    if part in listed:
        files = [root / name for name in listed[part]]
    else:
        held_out = {name for names in listed.values() for name in names}
        files = [
            path
            for path in audio_files(root)
            if path.relative_to(root).as_posix() not in held_out
            and not path.parent.name.startswith("_")  # _background_noise_
        ]
    for path in files:
        word, speaker = path.parent.name, path.stem.partition("_nohash_")[0]
        utt = f"speechcommands-{speaker}-{word}-{path.stem.rpartition('_')[2]}"
        speaker = f"speechcommands-{speaker}"
        found.add(utt, path, "speech", speaker, word.upper(), word)


CORPUS = Corpus(
    name="speechcommands",
    read=read,
    parts={"train": 84843, "valid": 9981, "test": 11005},
    default_parts=("train",),
    licence="CC BY 4.0",
    source="http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
    layout="<word>/<speaker>_nohash_<n>.wav, validation_list.txt, testing_list.txt",
)

if __name__ == "__main__":
    CORPUS.main()

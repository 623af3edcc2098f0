#!/usr/bin/env python3
"""Prepare any folders of audio, or Kaldi data directories, as data directories.

Folders are given as one string: "/data/a /data/b", with quotes inside it around a
path with spaces, and optionally with a label that starts the utterance ids:
"birds=/data/a". A folder with wav.scp is taken for a Kaldi data directory.
"""

import argparse
import logging
import os
import shlex
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from espnet2_spear.fileio.audio import AUDIO_SUFFIXES
from espnet2_spear.fileio.datadir import DOMAINS, Entry, check, entries, write_entries
from espnet2_spear.fileio.explain import command
from espnet2_spear.fileio.external_sorter import ExternalSorter
from espnet2_spear.fileio.folders import audio_files, find_audio
from espnet2_spear.fileio.hashes import digest_of, name_hash
from espnet2_spear.fileio.names import safe_id, short_id
from espnet2_spear.fileio.tables import DataDirError


def parse_folders(value: str) -> list[tuple[str, Path]]:
    """Split an option's value into (label, folder)."""
    one_folder = bool(value.strip()) and Path(value).is_dir()
    words = [value] if one_folder else shlex.split(value)
    folders = []
    for word in words:
        label, equals, folder = word.partition("=")
        if not equals or Path(word).is_dir():
            label, folder = Path(word).resolve().name, word
        folders.append((safe_id(label), Path(folder)))
    return folders


def from_audio_files(folder: Path, label: str, domain: str) -> ExternalSorter[Entry]:
    """List a folder's audio files as utterances, each a speaker of its own.

    Memory: a hash of each id, some 80 bytes, for those that occur twice.

    Raises:
        DataDirError: there is no audio file.
    """
    found: ExternalSorter[Entry] = ExternalSorter()
    seen: set[int] = set()

    def is_new(utt: str) -> bool:
        before = len(seen)
        seen.add(name_hash(utt))
        return len(seen) > before

    for file in audio_files(folder):
        relative = file.relative_to(folder).with_suffix("").as_posix()
        stem = safe_id(relative)
        if stem != relative.replace("/", "-"):  # as in any script but the Latin one
            stem += f"-{digest_of(relative)[:8]}"
        # Ids also name files, whose names cannot be of any length.
        name = short_id(f"{label}-{stem}")
        utt, number = name, 1
        while not is_new(utt):  # a.wav beside a.flac
            number += 1
            utt = f"{name}_{number}"
        found.add(Entry(utt, str(file.absolute()), utt, domain))
    if not len(found):
        raise DataDirError(
            f"{folder}: no audio files found; known are: "
            + " ".join(sorted(AUDIO_SUFFIXES))
        )
    return found


def from_kaldi_dir(folder: Path, domain: str) -> Iterator[Entry]:
    """Read a Kaldi data directory; paths become absolute, a missing domain is set.

    Raises:
        DataDirError: see :func:`espnet2_spear.fileio.datadir.entries`.
    """
    check(folder)

    find = lru_cache(maxsize=1000)(lambda value: find_audio(value, folder))
    for entry in entries(folder):
        yield entry._replace(
            path=os.path.abspath(find(entry.path)),
            domain=entry.domain or domain,
            samples=None,  # of other audio than ours will be
        )


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speech_dirs", default="", help="folders of speech")
    parser.add_argument("--audio_dirs", default="", help="folders of general audio")
    parser.add_argument("--out_dir", type=Path, required=True, help="parent folder")
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Write one data directory a folder."""
    seen: dict[str, Path] = {}
    for domain in DOMAINS:
        for label, folder in parse_folders(getattr(args, f"{domain}_dirs")):
            if not folder.is_dir():
                raise DataDirError(
                    f"{folder}: no such folder; correct --{domain}_dirs "
                    "(quote a path with spaces inside the option's value)"
                )
            if label in seen:
                raise DataDirError(
                    f"{seen[label]} and {folder} have the same name; give one another "
                    f'label: --{domain}_dirs "other={folder}"'
                )
            seen[label] = folder
            if (folder / "wav.scp").exists():
                found = from_kaldi_dir(folder, domain)
            else:
                found = from_audio_files(folder, label, domain)
            count = write_entries(found, args.out_dir / label)
            logging.info("%s: %d utterances", folder, count)


if __name__ == "__main__":
    main()

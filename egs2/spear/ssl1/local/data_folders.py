#!/usr/bin/env python3
"""Prepare any folders of audio, or Kaldi data directories, as data directories.

Folders are given as one string: "/data/a /data/b", with quotes inside it around a
path with spaces, and optionally with a label that starts the utterance ids:
"birds=/data/a". A folder with wav.scp is taken for a Kaldi data directory.
"""

import argparse
import logging
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

from espnet2_spear.fileio.audio import AUDIO_SUFFIXES
from espnet2_spear.fileio.datadir import DOMAINS, DataDir, DataDirError


def parse_folders(value: str) -> list[tuple[str, Path]]:
    """Split an option's value into (label, folder)."""
    one_folder = bool(value.strip()) and Path(value).is_dir()
    words = [value] if one_folder else shlex.split(value)
    folders = []
    for word in words:
        label, equals, folder = word.partition("=")
        if not equals:
            label, folder = Path(word).resolve().name, word
        folders.append((safe_id(label), Path(folder)))
    return folders


def safe_id(text: str) -> str:
    """Return text with what does not belong into an utterance id replaced."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text.replace("/", "-"))


def from_audio_files(folder: Path, label: str, domain: str) -> DataDir:
    """List a folder's audio files as utterances, each a speaker of its own."""
    data = DataDir(wav_scp={}, utt2spk={}, path=folder)
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or file.suffix.lower() not in AUDIO_SUFFIXES or not file.is_file():
            continue
        name = f"{label}-{safe_id(relative.with_suffix('').as_posix())}"
        utt, number = name, 1
        while utt in data.wav_scp:  # a.wav beside a.flac, or "a b.wav" beside "a_b.wav"
            number += 1
            utt = f"{name}_{number}"
        data.wav_scp[utt] = str(file.absolute())
        data.utt2spk[utt] = utt
        data.utt2domain[utt] = domain
    if not data.wav_scp:
        raise DataDirError(
            f"{folder}: no audio files found; known are: "
            + " ".join(sorted(AUDIO_SUFFIXES))
        )
    return data


def from_kaldi_dir(folder: Path, domain: str) -> DataDir:
    """Read a Kaldi data directory; paths become absolute, a missing domain is set."""
    data = DataDir.load(folder)
    data.validate()
    # Kaldi's paths are relative to where its recipe ran; beside wav.scp comes second.
    for recording, value in data.wav_scp.items():
        candidates = [Path(value), folder / value]
        found = next((path for path in candidates if path.is_file()), candidates[0])
        data.wav_scp[recording] = os.path.abspath(found)
    data.utt2domain = data.utt2domain or dict.fromkeys(data.utterances, domain)
    return replace(data, utt2num_samples={})  # of other audio than ours will be


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speech_dirs", default="", help="folders of speech")
    parser.add_argument("--audio_dirs", default="", help="folders of general audio")
    parser.add_argument("--out_dir", type=Path, required=True, help="parent folder")
    return parser


def main(cmd: list[str] | None = None) -> None:
    """Write one data directory a folder."""
    args = get_parser().parse_args(cmd)
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
                data = from_kaldi_dir(folder, domain)
            else:
                data = from_audio_files(folder, label, domain)
            data.validate(require=("utt2domain",))
            data.write(args.out_dir / label)
            logging.info("%s: %d utterances", folder, len(data.utterances))


if __name__ == "__main__":
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s (%(module)s:%(lineno)d) %(levelname)s: %(message)s",
    )
    main()

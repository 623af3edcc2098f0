#!/usr/bin/env python3
"""Prepare the corpora of a YAML list (conf/data/*.yaml), one data directory each.

The list has entries
    - corpus: NAME         # data_NAME.py; its folder is the variable NAME in db.sh
      parts: [...]         # default: those for training
      weight: 1.0          # how often its utterances are trained on
      partial: false       # accept less than what was published
or, for any folder of audio files or Kaldi data directory,
    - folder: PATH         # or ${VARIABLE} of db.sh
      name: NAME           # begins the utterance ids
      domain: speech       # or audio
      weight: 1.0
    - manifest: PATH       # a list in NeMo's form, such as Granary's, or a folder of
      audio_root: PATH     # them: JSON lines with audio_filepath, duration, optionally
      ...                  # offset and text; relative paths start at audio_root, or
                           # where the list is
    - cuts: PATH           # of lhotse: cuts.jsonl.gz, or a folder in the form Shar
      audio_root: PATH     # where relative paths in it start; default: here
      ...
"""

import argparse
import hashlib
import importlib
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from corpus import Corpus
from data_folders import from_audio_files, from_kaldi_dir
from data_lhotse import from_cuts

from espnet2_spear.fileio.datadir import (
    DOMAINS,
    Entry,
    Segment,
    write_entries,
    write_table,
)
from espnet2_spear.fileio.explain import command, option_parser
from espnet2_spear.fileio.external_sorter import ExternalSorter
from espnet2_spear.fileio.names import safe_id
from espnet2_spear.fileio.tables import DataDirError, open_text

KEYS = {
    "corpus": {"corpus", "parts", "weight", "partial"},
    "folder": {"folder", "name", "domain", "weight"},
    "manifest": {"manifest", "audio_root", "name", "domain", "weight"},
    "cuts": {"cuts", "audio_root", "name", "domain", "weight"},
}
WEIGHTS = "weights"
MANIFEST = re.compile(r"\.jsonl?(\.gz)?$")
NO_CORPUS = ("data_asterisk", "data_corpora", "data_folders", "data_lhotse")


def read_list(path: Path) -> list[dict[str, Any]]:
    """Read and check a list; every entry gets a name and a weight.

    Raises:
        DataDirError: malformed or repeated entries.
    """
    try:
        with open_text(path) as file:
            content = yaml.safe_load(file.read())
        entries = content["corpora"]
        if not entries or not all(isinstance(entry, dict) for entry in entries):
            raise TypeError("it is empty, or has entries that are no mappings")
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise DataDirError(f"{path}: needs a list `corpora` ({error})") from None
    seen: set[str] = set()
    for entry in entries:
        kind = next((kind for kind in KEYS if kind in entry), "folder")
        unknown = set(entry) - KEYS[kind]
        if kind not in entry or unknown:
            raise DataDirError(
                f"{path}: entry {entry}: needs {', '.join(KEYS)} (one of them), and "
                f"may have {', '.join(sorted(KEYS[kind]))}"
            )
        name = entry.setdefault("name", entry.get("corpus"))
        if not name or not re.fullmatch("[a-z0-9_]+", name) or name in seen:
            raise DataDirError(
                f"{path}: entry {entry}: needs a `name` of its own, of a-z, 0-9 and _"
            )
        seen.add(name)
        weight = entry.setdefault("weight", 1.0)
        if not isinstance(weight, (int, float)) or not 0 < weight <= 100:
            raise DataDirError(f"{path}: {name}: weight {weight} is not in (0, 100]")
        if kind != "corpus" and entry.get("domain") not in DOMAINS:
            raise DataDirError(f"{path}: {name}: `domain` must be speech or audio")
    return entries


def known_corpora() -> dict[str, Corpus]:
    """The corpora that there is a data_<name>.py for."""
    modules = (
        importlib.import_module(path.stem)
        for path in sorted(Path(__file__).parent.glob("data_*.py"))
        if path.stem not in NO_CORPUS
    )
    return {module.CORPUS.name: module.CORPUS for module in modules}


def prefixed(entry: Entry, name: str) -> Entry:
    """Return an utterance with ids that begin with a name and a hyphen."""
    segment = entry.segment
    if segment is not None:
        segment = segment._replace(recording=f"{name}-{segment.recording}")
    return entry._replace(
        utt=f"{name}-{entry.utt}", speaker=f"{name}-{entry.speaker}", segment=segment
    )


def root_of(entry: dict[str, Any]) -> Path:
    """Return the folder or file of an entry that is no corpus.

    Raises:
        DataDirError: it is not named or not there.
    """
    kind = next(kind for kind in ("manifest", "cuts", "folder") if kind in entry)
    variable = re.match(r"\$\{(\w+)\}", entry[kind])
    value = entry[kind]
    if variable:
        root = os.environ.get(variable[1], "")
        value = root and root + value[variable.end() :]
    path = Path(value)
    if not value or not (path.is_dir() if kind == "folder" else path.exists()):
        raise DataDirError(
            f"{entry['name']}: no {kind} '{value}'; set "
            f"{variable[1] + ' in db.sh' if variable else f'`{kind}` in the list'}"
        )
    return path


def roots_of(path: Path) -> list[Path]:
    """Folders and manifests that a list reads, of those that are named and there."""
    known, found = known_corpora(), []
    for entry in read_list(path):
        if entry.get("corpus") in known:
            value = os.environ.get(known[entry["corpus"]].variable)
            found += [Path(value)] if value else []
        elif "corpus" not in entry:
            try:
                found.append(root_of(entry))
            except DataDirError:  # preparing the list tells more about it
                continue
    return [root for root in dict.fromkeys(found) if root.exists()]


def from_manifests(
    path: Path, name: str, domain: str, audio_root: Path | None
) -> ExternalSorter[Entry]:
    """Read a manifest in NeMo's form, or all of a folder.

    Args:
        path: of the manifest or folder.
        name: begins the ids.
        domain: of all utterances.
        audio_root: where relative paths start; None: where the manifest is.

    Raises:
        DataDirError: no manifest, a malformed line, which is named, or no UTF-8.
    """
    paths = [path]
    if path.is_dir():
        paths = sorted(p for p in path.iterdir() if MANIFEST.search(p.name))
        if not paths:
            raise DataDirError(f"{path}: no *.json, *.jsonl or *.jsonl.gz is in it")
    found: ExternalSorter[Entry] = ExternalSorter()
    for one in paths:
        _read_manifest(one, name, domain, audio_root or one.parent, found)
    return found


def _read_manifest(
    path: Path, name: str, domain: str, root: Path, found: ExternalSorter[Entry]
) -> None:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
                audio = str(root / entry["audio_filepath"])
                start = float(entry.get("offset", 0.0))
                end = start + float(entry["duration"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataDirError(
                    f"{path}, line {number}: needs audio_filepath and "
                    f"duration ({error})"
                ) from None
            # With a hash: files of two folders can have one name.
            digest = hashlib.blake2b(
                os.fsencode(entry["audio_filepath"]), digest_size=8
            )
            stem = safe_id(Path(entry["audio_filepath"]).with_suffix("").as_posix())
            recording = f"{name}-{digest.hexdigest()}-{stem.strip('-')[-60:]}"
            utt = f"{recording}_{round(start * 1000):09d}"
            text = " ".join(str(entry.get("text") or "").split())
            segment = Segment(recording, start, end)
            found.add(Entry(utt, audio, recording, domain, segment, text or None))


def from_folder(entry: dict[str, Any], out_dir: Path) -> Iterable[Entry]:
    """Prepare an entry that is no corpus; cuts write more into its data directory."""
    folder = entry["root"]
    if "cuts" in entry:
        audio_root = Path(entry.get("audio_root", ""))
        return from_cuts(folder, entry["name"], entry["domain"], audio_root, out_dir)
    if "manifest" in entry:
        root = Path(entry["audio_root"]) if "audio_root" in entry else None
        return from_manifests(folder, entry["name"], entry["domain"], root)
    if (folder / "wav.scp").exists():
        found = from_kaldi_dir(folder, entry["domain"])
        return (prefixed(utterance, entry["name"]) for utterance in found)
    return from_audio_files(folder, entry["name"], entry["domain"])


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = option_parser(__doc__)
    parser.add_argument("--config", type=Path, help="YAML list")
    parser.add_argument("--out_dir", type=Path, help="parent folder")
    parser.add_argument(
        "--roots", action="store_true", help="only list the folders that it reads"
    )
    parser.add_argument("--list", action="store_true", help="list the known corpora")
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Write a data directory an entry, and the weights beside them."""
    known = known_corpora()
    if args.list:
        for name, corpus in known.items():
            print(f"{name}: {corpus.source}; {corpus.licence}")
            print(f"    parts: {', '.join(corpus.parts)}; folder: {corpus.layout}")
        return
    if args.roots:
        print(*roots_of(args.config), sep="\n")
        return
    entries = read_list(args.config)
    # All folders are looked at before the first corpus, which may take hours.
    for entry in entries:
        if "corpus" in entry:
            if entry["corpus"] not in known:
                raise DataDirError(
                    f"{args.config}: unknown corpus '{entry['corpus']}'; known are "
                    f"{', '.join(known)}; any folder can be named by `folder`"
                )
            corpus = known[entry["corpus"]]
            entry["root"] = corpus.root(os.environ.get(corpus.variable))
        else:
            entry["root"] = root_of(entry)
    for entry in entries:
        if "corpus" in entry:
            corpus, partial = known[entry["corpus"]], entry.get("partial", False)
            prepared = corpus.prepare(entry["root"], entry.get("parts", ()), partial)
            found, missing = prepared.entries, prepared.missing
        else:
            found, missing = from_folder(entry, args.out_dir / entry["name"]), 0
        count = write_entries(found, args.out_dir / entry["name"])
        logging.info(
            "%s: %d utterances, weight %s, %d listed files missing",
            *(entry["name"], count, entry["weight"], missing),
        )
    weights = {entry["name"]: entry["weight"] for entry in entries}
    write_table(args.out_dir.parent / WEIGHTS, weights)


if __name__ == "__main__":
    main()

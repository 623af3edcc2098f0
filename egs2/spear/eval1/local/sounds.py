#!/usr/bin/env python3
"""Collect labelled sound clips from the unpacked packages, as a data directory.

Written besides the usual tables: `labels` (utterance and class) and `groups` (clips of
one instrument, speaker's prompt list or track, which a split keeps together).
"""

import argparse
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from containers import read_cat, read_sf3
from unzip_audio import unzip

from espnet2_spear.fileio.audio import AUDIO_SUFFIXES, audio_info
from espnet2_spear.fileio.datadir import (
    DataDirError,
    Entry,
    Segment,
    write_entries,
    write_table,
)
from espnet2_spear.fileio.explain import command, option_parser

UFOAI = ("weapons", "ambience", "footsteps", "aliens", "soldiers")
UFOAI_SMALL = ("impact", "doors")  # 13 and 8 clips
VEHICLE = re.compile(
    r"\b(train|locomotive|ship|ferry|plane|jet|helicopter|bus|truck|car)\b",
    re.IGNORECASE,
)
NO_VEHICLE = re.compile(r"wheels|breakdown", re.IGNORECASE)  # impacts
DRUM = re.compile(r"kick|snr|snare|tom\b|hat\b|crash|cym|ride\b|conga|bongo", re.I)
INSTRUMENT = re.compile(
    r"(piano|violin|viola|cello|trumpet|trombone|tuba|french horns|oboe|clarinet|flute"
    r"|bassoon|sax|harp|celesta|marimba|vibraphone|banjo|sitar|church organ|harpsichord"
    r"|acoustic bass|english horn|piccolo)",
    re.IGNORECASE,
)
VOICES = ("en_US_f_Allison", "es_MX_f_Allison", "fr_CA_f_June")
VOICES += ("it_IT_m_Carlo", "ru_RU_f_IvrvoiceRU")
SONIC_PI_DRUMS = re.compile(r"^(bd|drum|sn|perc|tabla)_")
OPENSFX = "usr/share/games/openttd/baseset/opensfx/opensfx.cat"
SOUNDFONT = "usr/share/sounds/sf3/MuseScore_General_Lite.sf3"
MUSIC_PIECES = 8  # of each track
MUSIC_SECONDS = 10.0
MAX_CLIPS = 110  # of a class


class Clip(NamedTuple):
    """A sound: where it is, what it is, and what it must not be separated from."""

    name: str
    label: str
    path: Path
    group: str
    start: float = 0.0
    end: float = -1.0


def order(clip: Any) -> str:
    """Key, by a clip's name, of an order that looks random and is always the same."""
    return hashlib.sha256(clip.name.encode("utf-8", "surrogateescape")).hexdigest()


def audio_files(folder: Path) -> list[Path]:
    """Audio files below a folder that must have some.

    Raises:
        DataDirError: there are none.
    """
    files = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in AUDIO_SUFFIXES]
    if not files:
        raise DataDirError(f"{folder}: no audio files; run stage 1 of run.sh again")
    return files


def write_sound(folder: Path, name: str, suffix: str, content: bytes) -> Path:
    """Write a sound that came out of a container."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{re.sub('[^A-Za-z0-9]+', '_', name)}{suffix}"
    if not path.exists() or path.stat().st_size != len(content):
        path.write_bytes(content)
    return path


def animals(root: Path) -> Iterator[Clip]:
    """Yield the animals' voices of tuxpaint-stamps-default.

    Its spoken descriptions are called ``*_desc*``. A cow and the white cow are one
    group.
    """
    for path in audio_files(root / "usr/share/tuxpaint/stamps/animals"):
        if "_desc" not in path.stem:
            kind = f"tuxpaint-{path.stem.split('_')[0]}"
            yield Clip(f"tuxpaint-{path.stem}", "animal", path, kind)


def clips(root: Path, folder: Path, all_classes: bool) -> Iterator[Clip]:
    """Yield all labelled sounds of the packages.

    Args:
        root: where the packages are unpacked.
        folder: gets the sounds of the containers.
        all_classes: animals, impacts and doors, too.
    """
    for archive in sorted((root / "usr/share/games/ufoai/base").glob("*.pk3")):
        unzip(archive, root / "ufoai")
    if all_classes:
        yield from animals(root)
    for label in UFOAI + UFOAI_SMALL * all_classes:
        for path in audio_files(root / "ufoai/sound" / label):
            name = path.relative_to(root / "ufoai/sound").with_suffix("").as_posix()
            yield Clip(f"ufoai-{name}", label, path, f"ufoai-{name}")
    for path in audio_files(root / "usr/share/sonic-pi/samples"):
        if SONIC_PI_DRUMS.match(path.name):
            yield Clip(f"sonicpi-{path.stem}", "drum", path, f"sonicpi-{path.stem}")
    for path in audio_files(root / "usr/share/asterisk/moh"):
        seconds = audio_info(path).seconds
        for piece in range(MUSIC_PIECES):
            start = piece * max(MUSIC_SECONDS, seconds / MUSIC_PIECES)
            if start + MUSIC_SECONDS <= seconds:
                name = f"moh-{path.stem}-{piece}"
                end = start + MUSIC_SECONDS
                yield Clip(name, "music", path, f"moh-{path.stem}", start, end)
    sounds = root / "usr/share/asterisk/sounds"
    for voice in VOICES:
        spoken = [
            Clip(f"{voice}-{path.stem}", "speech", path, f"{voice}-{path.stem}")
            for path in audio_files(sounds / voice)
            if path.parent.name != "silence" and "beep" not in path.stem
        ]
        yield from sorted(spoken, key=order)[: MAX_CLIPS // len(VOICES)]
    for index, (caption, content) in enumerate(read_cat(root / OPENSFX)):
        title = caption.split('"')[1] if caption.count('"') > 1 else caption
        if VEHICLE.search(title) and not NO_VEHICLE.search(title):
            path = write_sound(folder, f"opensfx_{index:02d}", ".wav", content)
            yield Clip(f"opensfx-{index:02d}", "vehicle", path, f"opensfx-{index:02d}")
    for path in audio_files(root / "ufoai/sound/ugv"):
        yield Clip(f"ufoai-ugv-{path.stem}", "vehicle", path, f"ufoai-ugv-{path.stem}")
    for index, (name, _, content) in enumerate(read_sf3(root / SOUNDFONT)):
        instrument = INSTRUMENT.search(name)
        if not (DRUM.search(name) or instrument):
            continue
        path = write_sound(folder, f"sf3_{index:04d}", ".ogg", content)
        # Other notes of an instrument, and the other strokes beside one in a kit, are
        # too alike to be divided.
        label, group = "drum", f"sf3-{index // 12}"
        if not DRUM.search(name):
            label, group = "instrument", f"sf3-{instrument[1].lower()}"
        yield Clip(f"sf3-{index:04d}", label, path, group)


def balanced(found: list[Clip], max_clips: int) -> list[Clip]:
    """Keep at most so many clips of a class, the groups of it in turn."""
    rank: Counter = Counter()
    queues: dict[str, list[tuple[int, Clip]]] = {}
    for clip in sorted(found, key=order):
        rank[clip.label, clip.group] += 1
        entry = (rank[clip.label, clip.group], clip)
        queues.setdefault(clip.label, []).append(entry)
    return [
        clip
        for queue in queues.values()
        for _, clip in sorted(queue, key=lambda entry: (entry[0], order(entry[1])))[
            :max_clips
        ]
    ]


def write_clips(found: list[Clip], out_dir: Path) -> None:
    """Write a data directory with the tables `labels` and `groups`.

    Raises:
        DataDirError: two clips get the same id.
    """
    entries, groups = [], {}
    for clip in found:
        utt = re.sub(r"[^A-Za-z0-9._-]+", "_", clip.name.replace("/", "-"))
        domain = "speech" if clip.label == "speech" else "audio"
        segment = Segment(utt, clip.start, clip.end)
        entry = Entry(utt, str(clip.path.absolute()), utt, domain, segment)
        entries.append(entry._replace(labels=clip.label))
        groups[utt] = re.sub(r"\s+", "_", clip.group)  # names a line of a table
    write_entries(sorted(entries), out_dir)
    write_table(out_dir / "groups", groups)
    counts = Counter(clip.label for clip in found).most_common()
    named = ", ".join(f"{label} {count}" for label, count in counts)
    logging.info("%d clips: %s", len(found), named)


def package_parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of what makes a data directory of unpacked packages."""
    parser = option_parser(description)
    parser.add_argument("--root", type=Path, required=True, help="unpacked package")
    parser.add_argument("--out_dir", type=Path, required=True, help="data directory")
    return parser


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = package_parser(__doc__)
    parser.add_argument("--max_clips", type=int, default=MAX_CLIPS, help="of a class")
    parser.add_argument(
        "--all_classes", action="store_true", help="animal, impact and doors, too"
    )
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Write the data directory."""
    every = list(clips(args.root, args.out_dir / "clips", args.all_classes))
    write_clips(balanced(every, args.max_clips), args.out_dir)


if __name__ == "__main__":
    main()

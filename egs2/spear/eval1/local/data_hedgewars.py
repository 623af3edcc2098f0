#!/usr/bin/env python3
"""Phrases of a game's voices as a data directory: what is said, by whom.

hedgewars-data has a folder for each voice and a file for each phrase. Kept are the
phrases that all English voices say. Besides the usual tables it writes `labels`
(utterance and phrase) and `groups` (its voice).
"""

import argparse
import logging
from functools import partial
from pathlib import Path

from sounds import package_parser

from espnet2_spear.fileio.datadir import DataDirError, Entry, write_entries, write_table
from espnet2_spear.fileio.explain import command

VOICES = "usr/share/games/hedgewars/Data/Sounds/voices"
ENGLISH = ("British", "Classic", "Default", "HillBilly", "Mobster", "Pirate", "Robot")
ENGLISH += ("Russian", "Singer", "Surfer")


get_parser = partial(package_parser, __doc__)


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Write the data directory.

    Raises:
        DataDirError: a voice is missing, or they share no phrase.
    """
    files: dict[str, dict[str, Path]] = {}
    for voice in ENGLISH:
        folder = args.root / VOICES / voice
        files[voice] = {path.stem: path for path in sorted(folder.glob("*.ogg"))}
        if not files[voice]:
            raise DataDirError(f"{folder}: no .ogg files; run stage 1 of run.sh again")
    shared = sorted(set.intersection(*(set(found) for found in files.values())))
    if not shared:
        raise DataDirError(f"{args.root / VOICES}: the voices share no phrase")
    clips = []
    for voice, found in files.items():
        for phrase in shared:
            file = str(found[phrase].absolute())
            clip = Entry(f"{voice}-{phrase}", file, voice, "speech", labels=phrase)
            clips.append(clip)
    write_entries(sorted(clips), args.out_dir)
    write_table(args.out_dir / "groups", {clip.utt: clip.speaker for clip in clips})
    logging.info("%d phrases of %d voices", len(shared), len(files))


if __name__ == "__main__":
    main()

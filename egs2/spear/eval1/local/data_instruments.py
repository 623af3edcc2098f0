#!/usr/bin/env python3
"""Samples of a soundfont as a data directory: which family, or octave, is it?

The families are those of General MIDI (eight programs each) and drum kits; samples that
several families play are left out. Octaves are those of the recorded note (4 begins at
middle C), of families that have notes; the lowest and highest take in what lies beyond.
Besides the usual tables it writes `labels` and `groups` (the first program that plays
the sample; splits keep it together).
"""

import argparse
from collections import Counter

from containers import read_presets, read_sf3
from sounds import SOUNDFONT, Clip, balanced, package_parser, write_clips, write_sound

from espnet2_spear.fileio.explain import command

FAMILIES = "piano percussion organ guitar bass strings ensemble brass reed pipe".split()
FAMILIES += "lead pad effects ethnic percussive sound_effects".split()
DRUMS = 128  # bank of drum kits
WITHOUT_NOTES = ("drums", "percussive", "sound_effects")
OCTAVES = (2, 7)
MAX_CLIPS, MIN_CLIPS = 60, 20  # of a class; smaller ones are left out


def family(players: set[tuple[int, int]]) -> str | None:
    """Family of (bank, program)s; None if there are several."""
    found = {"drums" if b == DRUMS else FAMILIES[p // 8] for b, p in players}
    return found.pop() if len(found) == 1 else None


def octave(label: str | None, key: int) -> str | None:
    """Octave of a MIDI key; None if the family has no notes."""
    if label is None or label in WITHOUT_NOTES:
        return None
    lowest, highest = OCTAVES
    return f"octave{min(max(key // 12 - 1, lowest), highest)}"


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = package_parser(__doc__)
    parser.add_argument("--label", choices=["family", "octave"], default="family")
    parser.add_argument("--max_clips", type=int, default=MAX_CLIPS, help="of a class")
    parser.add_argument("--min_clips", type=int, default=MIN_CLIPS, help="of a class")
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Write the data directory."""
    players = read_presets(args.root / SOUNDFONT)
    clips = []
    for index, (_, key, content) in enumerate(read_sf3(args.root / SOUNDFONT)):
        label = family(players.get(index, set()))
        if args.label == "octave":
            label = octave(label, key)
        if label is not None:
            bank, program = min(players[index])
            group = f"drums-{program}" if bank == DRUMS else f"program-{program}"
            path = write_sound(
                args.out_dir / "clips", f"sf3_{index:04d}", ".ogg", content
            )
            clips.append(Clip(f"sf3-{index:04d}", label, path, group))
    sizes = Counter(clip.label for clip in clips)
    clips = [clip for clip in clips if sizes[clip.label] >= args.min_clips]
    write_clips(balanced(clips, args.max_clips), args.out_dir)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Drop utterances that are too short, too long or silent, and list them.

Reads what spear_format wrote; the audio files stay where they are.
"""

from __future__ import annotations

import argparse
import heapq
import logging
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from operator import itemgetter
from pathlib import Path

from espnet2_spear.fileio.datadir import RAW
from espnet2_spear.fileio.datadir_stream import Entry, EntryWriter, entries
from espnet2_spear.fileio.explain import main_with_one_line_errors
from espnet2_spear.fileio.external_sorter import c_order
from espnet2_spear.fileio.tables import DataDirError, TableWriter, sorted_rows


def reason_to_skip(
    seconds: float,
    peak_db: float,
    min_seconds: float,
    max_seconds: float,
    min_peak_db: float,
) -> str:
    """Return why an utterance is unfit for training, or an empty string."""
    if seconds < min_seconds:
        return f"too_short {seconds:.3f} s, the limit is {min_seconds} s"
    if seconds > max_seconds:
        return f"too_long {seconds:.3f} s, the limit is {max_seconds} s"
    if peak_db < min_peak_db:
        return f"silence peak {peak_db:.1f} dB, the limit is {min_peak_db} dB"
    return ""


def skipped_before(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the utterances that spear_format left out, with the reason."""
    return sorted_rows(folder / "skipped.txt", "utterance reason")


def with_peaks(folder: Path) -> Iterator[tuple[Entry, float]]:
    """Yield utterances, and the largest deviation from the mean in dB.

    Raises:
        DataDirError: utt2peak_db is of other utterances.
    """
    peaks = sorted_rows(folder / "utt2peak_db", "utterance peak")
    found = entries(folder, require=("utt2num_samples",))
    for entry, peak in zip_longest(found, peaks):
        if entry is None or peak is None or entry.utt != peak[0]:
            utt = entry.utt if entry is not None else peak[0]
            raise DataDirError(
                f"{folder}/utt2peak_db: does not have the utterances of wav.scp, e.g. "
                f"'{utt}'; remove the folder's wav.scp and run stage 2 again"
            )
        yield entry, float(peak[1])


def filter_entries(args: argparse.Namespace) -> tuple[Counter[str], float, int]:
    """Write what is kept, and skipped.txt.

    Returns:
        how many were skipped, by reason; seconds and number of those kept.

    Raises:
        DataDirError: none is left.
    """
    limits = (args.min_seconds, args.max_seconds, args.min_peak_db)
    reasons: Counter[str] = Counter()
    samples = 0
    args.out_dir.mkdir(parents=True, exist_ok=True)
    skipped = TableWriter(args.out_dir / "skipped.txt")
    before = (
        (c_order(utt), utt, None, line) for utt, line in skipped_before(args.in_dir)
    )
    good = (
        (c_order(entry.utt), entry.utt, entry, peak)
        for entry, peak in with_peaks(args.in_dir)
    )
    try:
        with EntryWriter(args.out_dir, RAW) as writer:
            for _, utt, entry, found in heapq.merge(before, good, key=itemgetter(0)):
                reason = found
                if entry is not None:
                    seconds = entry.samples / args.fs
                    reason = reason_to_skip(seconds, found, *limits)
                if reason:
                    skipped.add(utt, reason)
                    reasons[reason.split()[0]] += 1
                else:
                    writer.add(entry)
                    samples += entry.samples
            skipped.finish()
            if not writer.count:
                raise DataDirError(
                    f"{args.in_dir}: no utterance is left ({summary(reasons)}); see "
                    f"{args.out_dir}/skipped.txt and the limits --min_seconds, "
                    "--max_seconds, --min_peak_db"
                )
    finally:
        skipped.discard()
    return reasons, samples / args.fs, writer.count


def summary(reasons: Counter[str]) -> str:
    """Return numbers of skipped utterances in words."""
    return ", ".join(f"{reason} {n}" for reason, n in sorted(reasons.items()))


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in_dir", type=Path, required=True, help="of spear_format")
    parser.add_argument("--out_dir", type=Path, required=True, help="data directory")
    parser.add_argument("--fs", type=int, default=16000, help="sampling rate in Hz")
    parser.add_argument("--min_seconds", type=float, default=0.5)
    parser.add_argument("--max_seconds", type=float, default=30.0)
    parser.add_argument(
        "--min_peak_db",
        type=float,
        default=-60.0,
        help="silence if no sample deviates from the mean by more (dB of full scale)",
    )
    return parser


def main(cmd: list[str] | None = None) -> None:
    """Filter a data directory.

    Example:
        % python -m espnet2_spear.bin.spear_filter \\
            --in_dir dump/raw/org/train --out_dir dump/raw/train --max_seconds 30
    """
    main_with_one_line_errors(get_parser(), run, cmd)


def run(args: argparse.Namespace) -> None:
    """Filter, and say what was left out and why."""
    reasons, seconds, kept = filter_entries(args)
    if reasons:
        logging.warning(
            "skipped %d utterances (%s), listed in %s/skipped.txt",
            sum(reasons.values()),
            summary(reasons),
            args.out_dir,
        )
    logging.info("%s: %d utterances, %.1f min", args.out_dir, kept, seconds / 60)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Drop utterances that are too short, too long or silent, and list them.

Reads what spear_format wrote; the audio files stay where they are.
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from espnet2_spear.bin.spear_format import in_words
from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.datadir import (
    RAW,
    Entry,
    check_other_folder,
    entries,
    entry_writer,
)
from espnet2_spear.fileio.explain import command, option_parser
from espnet2_spear.fileio.tables import DataDirError, join, sorted_rows, table_writer


def formatted(folder: Path) -> Iterator[tuple[str, Entry | None, str, float]]:
    """Yield what spear_format wrote of every utterance.

    Yields:
        id; entry, None if it was skipped; the reason of that; the largest deviation
        from the mean in dB.

    Raises:
        DataDirError: utt2peak_db is of other utterances.
    """
    for utt, (entry, peak, skipped) in join(
        entries(folder, require=("utt2num_samples",)),
        sorted_rows(folder / "utt2peak_db", "utterance peak"),
        sorted_rows(folder / "skipped.txt", "utterance reason"),
    ):
        if (entry is None) != (peak is None):
            raise DataDirError(
                f"{folder}/utt2peak_db: does not have the utterances of wav.scp, e.g. "
                f"'{utt}'; remove the folder's wav.scp and run stage 2 again"
            )
        reason = "" if skipped is None else skipped[1]
        yield utt, entry, reason, 0.0 if peak is None else float(peak[1])


def reason_to_skip(seconds: float, peak_db: float, args: argparse.Namespace) -> str:
    """Return why an utterance is unfit for training, or an empty string."""
    if seconds < args.min_seconds:
        return f"too_short {seconds:.3f} s, the limit is {args.min_seconds} s"
    if seconds > args.max_seconds:
        return f"too_long {seconds:.3f} s, the limit is {args.max_seconds} s"
    if peak_db < args.min_peak_db:
        return f"silence peak {peak_db:.1f} dB, the limit is {args.min_peak_db} dB"
    return ""


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = option_parser(__doc__)
    parser.add_argument("--in_dir", type=Path, required=True, help="of spear_format")
    parser.add_argument("--out_dir", type=Path, required=True, help="data directory")
    parser.add_argument("--fs", type=int, default=SAMPLE_RATE, help="sampling rate, Hz")
    parser.add_argument("--min_seconds", type=float, default=0.5)
    parser.add_argument("--max_seconds", type=float, default=30.0)
    parser.add_argument(
        "--min_peak_db",
        type=float,
        default=-60.0,
        help="silence if no sample deviates from the mean by more (dB of full scale)",
    )
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Write what is kept, and skipped.txt.

    Example:
        % python -m espnet2_spear.bin.spear_filter \\
            --in_dir dump/raw/org/train --out_dir dump/raw/train --max_seconds 30

    Raises:
        DataDirError: no utterance is left, or the same folder twice.
    """
    check_other_folder(args.in_dir, args.out_dir)
    reasons: Counter[str] = Counter()
    samples = 0
    with entry_writer(args.out_dir, RAW) as writer:
        with table_writer(args.out_dir / "skipped.txt") as skipped:
            for utt, entry, reason, peak in formatted(args.in_dir):
                if entry is not None:
                    reason = reason_to_skip(entry.samples / args.fs, peak, args)
                if reason:
                    skipped.add(utt, reason)
                    reasons[reason.split()[0]] += 1
                else:
                    writer.add(entry)
                    samples += entry.samples
        found = in_words(reasons)
        if not writer.count:
            raise DataDirError(
                f"{args.in_dir}: no utterance is left ({found}); see "
                f"{args.out_dir}/skipped.txt and the limits --min_seconds, "
                "--max_seconds, --min_peak_db"
            )
    if reasons:
        logging.warning(
            "skipped %d utterances (%s), listed in %s/skipped.txt",
            *(reasons.total(), found, args.out_dir),
        )
    minutes = samples / args.fs / 60
    logging.info("%s: %d utterances, %.1f min", args.out_dir, writer.count, minutes)


if __name__ == "__main__":
    main()

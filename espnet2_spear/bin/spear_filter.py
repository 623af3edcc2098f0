#!/usr/bin/env python3
"""Drop utterances that are too short, too long or silent, and list them.

Reads what spear_format wrote; the audio files stay where they are.
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from pathlib import Path

from espnet2_spear.fileio.datadir import DataDir, DataDirError, read_table, write_table


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
    args = get_parser().parse_args(cmd)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s (%(module)s:%(lineno)d) %(levelname)s: %(message)s",
    )
    data = DataDir.load(args.in_dir)
    data.validate(require=("utt2num_samples",))
    peaks = read_table(args.in_dir / "utt2peak_db", "utterance peak")
    skipped = read_table(args.in_dir / "skipped.txt", "utterance reason")
    keep = []
    for utt, samples in data.utt2num_samples.items():
        reason = reason_to_skip(
            samples / args.fs,
            float(peaks[utt]),
            args.min_seconds,
            args.max_seconds,
            args.min_peak_db,
        )
        if reason:
            skipped[utt] = reason
        else:
            keep.append(utt)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    write_table(args.out_dir / "skipped.txt", skipped)
    reasons = Counter(line.split()[0] for line in skipped.values())
    summary = ", ".join(f"{reason} {n}" for reason, n in sorted(reasons.items()))
    if not keep:
        raise DataDirError(
            f"{args.in_dir}: no utterance is left ({summary}); see "
            f"{args.out_dir}/skipped.txt and the limits --min_seconds, --max_seconds, "
            "--min_peak_db"
        )
    data.select(keep).write(args.out_dir)
    logging.info(
        "%s: %d utterances, %.1f min",
        args.out_dir,
        len(keep),
        sum(data.utt2num_samples[utt] for utt in keep) / args.fs / 60,
    )
    if skipped:
        logging.warning(
            "skipped %d utterances (%s), listed in %s/skipped.txt",
            len(skipped),
            summary,
            args.out_dir,
        )


if __name__ == "__main__":
    main()

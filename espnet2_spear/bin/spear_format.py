#!/usr/bin/env python3
"""Convert a data directory to 16-bit mono files of one rate, one an utterance.

Any format, rate and number of channels goes in; segments are cut. What cannot be used
is tried once more, then listed in skipped.txt with the reason, and the others go on.
What is used although something is wrong with it, such as a header that tells another
length than is there, or channels in opposite phase, is listed in notes.txt.
Work is done in shards: a killed run continues with the shards that are missing, and a
shard is done again if its audio files or the options have changed, or what was written
is not as it was (by its checksums).
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from espnet2_spear.fileio.convert import (
    AUDIO_FORMATS,
    SHARD_UTTERANCES,
    Options,
    Result,
    finish_shard,
    recordings_of,
    shards_of,
)
from espnet2_spear.fileio.datadir import RAW, check, entries, entry_writer
from espnet2_spear.fileio.explain import main_with_one_line_errors
from espnet2_spear.fileio.external_sorter import ExternalSorter, c_order
from espnet2_spear.fileio.job_share import WHOLE_JOB, JobShare, add_job_share_option
from espnet2_spear.fileio.shards import Progress, in_processes
from espnet2_spear.fileio.tables import DataDirError, table_writer


def run(
    in_dir: Path, options: Options, nj: int, total: int, part: JobShare
) -> Iterator[Result]:
    """Convert all utterances with ``nj`` processes; yield results in any order.

    Args:
        in_dir: data directory.
        options: how to write.
        nj: number of processes.
        total: number of utterances, for the time that is left.
        part: shards to convert.

    Raises:
        OSError: e.g. no space left; what is finished is kept.
        RuntimeError: a process was killed.
    """
    recordings = recordings_of(entries(in_dir))
    shards = enumerate(shards_of(recordings, options.shard_utterances))
    mine = (shard for number, shard in shards if part.has(number))
    finish = partial(finish_shard, options=options)
    progress, before = Progress(total, "utterances"), 0
    for results, was_done in in_processes(
        ProcessPoolExecutor(max(1, nj)), finish, mine, nj, in_dir
    ):
        if was_done:
            before += len(results)
            progress.total -= len(results)
        else:
            progress.add(len(results))
        yield from results
    if before:
        logging.info("%d utterances were already done", before)


@dataclass
class Totals:
    """What became of a data set: numbers of utterances, and samples."""

    good: int = 0
    samples: int = 0
    resampled: int = 0
    mixed_down: int = 0
    clipped: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, result: Result, fs: int) -> None:
        """Count an utterance; ``fs`` is the sampling rate wanted, in Hz."""
        if result.reason:
            self.reasons[result.reason] += 1
            return
        self.good += 1
        self.samples += result.samples
        self.resampled += result.source_rate != fs
        self.mixed_down += result.source_channels > 1
        self.clipped += result.clipped > 0
        self.notes.update(note.split()[0] for note in result.notes)


def write_results(
    in_dir: Path, results: Iterable[Result], out_dir: Path, fs: int
) -> Totals:
    """Write the converted data directory, utt2peak_db, skipped.txt and notes.txt.

    Args:
        in_dir: data directory that was converted.
        results: of all its utterances, in the order of their ids.
        out_dir: data directory.
        fs: sampling rate in Hz, for the totals.

    Raises:
        DataDirError: not one utterance could be converted.
    """
    totals = Totals()
    with (
        entry_writer(out_dir, RAW) as writer,
        table_writer(out_dir / "utt2peak_db") as peaks,
    ):
        with (
            table_writer(out_dir / "skipped.txt") as skipped,
            table_writer(out_dir / "notes.txt") as notes,
        ):
            for entry, result in zip(entries(in_dir), results, strict=True):
                totals.add(result, fs)
                if result.reason:
                    skipped.add(entry.utt, f"{result.reason} {result.detail}")
                    continue
                peaks.add(entry.utt, f"{result.peak_db:.2f}")
                for note in result.notes:
                    notes.add(entry.utt, note)
                new = {"path": result.file, "segment": None, "samples": result.samples}
                writer.add(entry._replace(**new))
        if not totals.good:
            raise DataDirError(
                f"{in_dir}: none of its {sum(totals.reasons.values())} utterances "
                f"could be converted; the reasons are in {out_dir}/skipped.txt"
            )
    return totals


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in_dir", type=Path, required=True, help="data directory")
    parser.add_argument("--out_dir", type=Path, required=True, help="data directory")
    parser.add_argument(
        "--audio_format",
        choices=AUDIO_FORMATS,
        default="flac",
        help="one file an utterance, or (.ark) one Kaldi ark a shard",
    )
    parser.add_argument("--fs", type=int, default=16000, help="sampling rate in Hz")
    parser.add_argument("--nj", type=int, default=1, help="processes")
    parser.add_argument(
        "--shard_utts",
        type=int,
        default=SHARD_UTTERANCES,
        help="utterances that are converted at a time, and that an ark holds",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="skip recordings whose headers tell another length than is there",
    )
    add_job_share_option(parser)
    return parser


def main(cmd: list[str] | None = None) -> None:
    """Convert a data directory.

    Example:
        % python -m espnet2_spear.bin.spear_format \\
            --in_dir data/train --out_dir dump/raw/org/train --nj 4
    """
    main_with_one_line_errors(get_parser(), format_directory, cmd)


def format_directory(args: argparse.Namespace) -> None:
    """Convert, and say what was skipped."""
    total = check(args.in_dir)
    options = Options(
        str(args.out_dir), args.audio_format, args.fs, args.shard_utts, args.strict
    )
    args.out_dir.mkdir(parents=True, exist_ok=True)
    if args.part is not None:
        total //= args.part.count
        done = sum(1 for _ in run(args.in_dir, options, args.nj, total, args.part))
        logging.info("%s: %d utterances in this part", args.out_dir, done)
        return
    by_utterance = ExternalSorter[Result](lambda r: c_order(r.utt), args.out_dir)
    with by_utterance as results:
        for result in run(args.in_dir, options, args.nj, total, WHOLE_JOB):
            results.add(result)
        totals = write_results(args.in_dir, results, args.out_dir, args.fs)
    logging.info(
        "%s: %d utterances, %.1f min; %d resampled to %d Hz, %d mixed down to mono, "
        "%d clipped",
        args.out_dir,
        totals.good,
        totals.samples / args.fs / 60,
        totals.resampled,
        args.fs,
        totals.mixed_down,
        totals.clipped,
    )
    if totals.notes:
        logging.warning(
            "%s: %s utterances are used although something is wrong with them, listed "
            "in %s/notes.txt",
            args.out_dir,
            ", ".join(f"{name} {n}" for name, n in sorted(totals.notes.items())),
            args.out_dir,
        )
    if totals.reasons:
        logging.warning(
            "skipped %d utterances (%s), listed in %s/skipped.txt",
            sum(totals.reasons.values()),
            ", ".join(f"{name} {n}" for name, n in sorted(totals.reasons.items())),
            args.out_dir,
        )


if __name__ == "__main__":
    main()

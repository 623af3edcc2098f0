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
from functools import partial
from pathlib import Path

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.convert import (
    AUDIO_FORMATS,
    SHARD_UTTERANCES,
    Options,
    Result,
    finish_shard,
    recordings_of,
    shards_of,
)
from espnet2_spear.fileio.datadir import (
    RAW,
    check,
    check_other_folder,
    entries,
    entry_writer,
)
from espnet2_spear.fileio.explain import command, option_parser
from espnet2_spear.fileio.external_sorter import ExternalSorter
from espnet2_spear.fileio.shards import (
    WHOLE_JOB,
    JobShare,
    ProgressLog,
    add_job_share_option,
    in_processes,
)
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
    shards = enumerate(shards_of(recordings, SHARD_UTTERANCES))
    mine = (shard for number, shard in shards if part.has(number))
    finish = partial(finish_shard, options=options)
    progress, before = ProgressLog(total, "utterances"), 0
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


def write_results(
    in_dir: Path, results: Iterable[Result], out_dir: Path, fs: int
) -> None:
    """Write the converted data directory, utt2peak_db, skipped.txt and notes.txt.

    Args:
        in_dir: data directory that was converted.
        results: of all its utterances, in the order of their ids.
        out_dir: data directory.
        fs: sampling rate in Hz that was wanted, for the log.

    Raises:
        DataDirError: not one utterance could be converted.
    """
    totals: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    with (
        entry_writer(out_dir, RAW) as writer,
        table_writer(out_dir / "utt2peak_db") as peaks,
    ):
        with (
            table_writer(out_dir / "skipped.txt") as reasons,
            table_writer(out_dir / "notes.txt") as notes,
        ):
            for entry, result in zip(entries(in_dir), results, strict=True):
                if result.reason:
                    reasons.add(entry.utt, f"{result.reason} {result.detail}")
                    skipped[result.reason] += 1
                    continue
                peaks.add(entry.utt, f"{result.peak_db:.2f}")
                for note in result.notes:
                    notes.add(entry.utt, note)
                    noted[note.split()[0]] += 1
                new = {"path": result.file, "segment": None, "samples": result.samples}
                writer.add(entry._replace(**new))
                totals["samples"] += result.samples
                totals["resampled"] += result.source_rate != fs
                totals["mixed down"] += result.source_channels > 1
                totals["clipped"] += result.clipped > 0
        if not writer.count:
            raise DataDirError(
                f"{in_dir}: none of its {skipped.total()} utterances could be "
                f"converted; the reasons are in {out_dir}/skipped.txt"
            )
    logging.info(
        f"{out_dir}: {writer.count} utterances, {totals['samples'] / fs / 60:.1f} min; "
        f"{totals['resampled']} resampled to {fs} Hz, {totals['mixed down']} mixed "
        f"down to mono, {totals['clipped']} clipped"
    )
    if noted:
        logging.warning(
            f"{out_dir}: {in_words(noted)} utterances are used although something is "
            f"wrong with them, listed in {out_dir}/notes.txt"
        )
    if skipped:
        logging.warning(
            f"skipped {skipped.total()} utterances ({in_words(skipped)}), listed in "
            f"{out_dir}/skipped.txt"
        )


def in_words(counts: Counter[str]) -> str:
    """Names and how many there are of each."""
    return ", ".join(f"{name} {number}" for name, number in sorted(counts.items()))


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = option_parser(__doc__)
    parser.add_argument("--in_dir", type=Path, required=True, help="data directory")
    parser.add_argument("--out_dir", type=Path, required=True, help="data directory")
    parser.add_argument(
        "--audio_format",
        choices=AUDIO_FORMATS,
        default="flac",
        help="one file an utterance, or (.ark) one Kaldi ark a shard",
    )
    parser.add_argument("--fs", type=int, default=SAMPLE_RATE, help="sampling rate, Hz")
    parser.add_argument("--nj", type=int, default=1, help="processes")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="skip recordings whose headers tell another length than is there",
    )
    add_job_share_option(parser)
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Convert a data directory.

    Example:
        % python -m espnet2_spear.bin.spear_format \\
            --in_dir data/train --out_dir dump/raw/org/train --nj 4

    Raises:
        DataDirError: tables that do not fit together, the same folder twice, or not one
            utterance that could be converted.
    """
    check_other_folder(args.in_dir, args.out_dir)
    total = check(args.in_dir)
    options = Options(str(args.out_dir), args.audio_format, args.fs, args.strict)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    if args.part is not None:
        total //= args.part.count
        done = sum(1 for _ in run(args.in_dir, options, args.nj, total, args.part))
        logging.info("%s: %d utterances in this part", args.out_dir, done)
        return
    with ExternalSorter[tuple[str, Result]](args.out_dir) as by_utterance:
        for result in run(args.in_dir, options, args.nj, total, WHOLE_JOB):
            by_utterance.add((result.utt, result))
        results = (result for _, result in by_utterance)
        write_results(args.in_dir, results, args.out_dir, args.fs)


if __name__ == "__main__":
    main()

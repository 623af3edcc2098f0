#!/usr/bin/env python3
"""Pool data directories into the sets train and valid for pre-training.

Long recordings are cut into pieces (Kaldi segments). Which recordings are held out,
and which are kept under a limit, is decided by a hash of their ids: the choice is the
same on every machine and does not change when data is added.
"""

import argparse
import hashlib
import heapq
import logging
import math
from array import array
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import count, islice
from pathlib import Path

import numpy as np

from espnet2_spear.fileio.atomic import write_json
from espnet2_spear.fileio.audio import AudioError, audio_info
from espnet2_spear.fileio.datadir import DOMAINS, Entry, Segment, entries, entry_writer
from espnet2_spear.fileio.explain import command
from espnet2_spear.fileio.external_sorter import ExternalSorter
from espnet2_spear.fileio.tables import DataDirError, Lines, sorted_rows

MEASURED_AT_ONCE = 5000  # recordings
# A recording up to so much longer than a piece may be stays whole: 10.005 s are not
# two pieces of 5 s, nor the 32 s that utterances of the paper last at most two of 16.
STAYS_WHOLE = 16 / 15


def hash_fraction(key: str, salt: str) -> float:
    """Return a number in [0, 1) that depends on nothing but the two strings."""
    digest = hashlib.sha256(f"{salt} {key}".encode("utf-8", "surrogateescape"))
    return int.from_bytes(digest.digest()[:8], "big") / 2**64


def recording_seconds(path: str) -> float:
    """Return a recording's duration, or -1 if it cannot be read (stage 2 lists it)."""
    try:
        return audio_info(path).seconds
    except (AudioError, OSError):
        return -1.0


def seconds_of(source: Path, pool: ProcessPoolExecutor) -> Callable[[Entry], float]:
    """Measure the recordings of a data directory.

    Returns:
        a function that tells the seconds of an utterance's recording.

    Raises:
        DataDirError: not one of them can be read.
    """
    unreadable, total, example = 0, 0, ""

    def measured() -> Iterator[tuple[str, float]]:
        nonlocal unreadable, total, example
        recordings = sorted_rows(source / "wav.scp", "recording file")
        # In parts: the pool takes all that it is given at once.
        while part := list(islice(recordings, MEASURED_AT_ONCE)):
            names, paths, _ = zip(*part, strict=True)
            found = pool.map(recording_seconds, paths, chunksize=50)
            total += len(part)
            for name, path, seconds in zip(names, paths, found, strict=True):
                if seconds < 0:
                    unreadable += 1
                    example = example or path
                yield name, seconds

    seconds = Lines.of(measured())
    if unreadable:
        why = ""
        try:
            audio_info(example)
        except (AudioError, OSError) as error:
            why = f", such as {example}: {error}"
        told = f"{source}: {unreadable} of {total} recordings cannot be read{why}"
        if unreadable == total:
            raise DataDirError(f"{told}; or leave {source.name} out")
        logging.warning("%s; stage 2 will list them", told)
    return lambda entry: float(seconds.find(entry.recording))


def cut(
    entry: Entry, seconds: float, max_seconds: float, whole: float | None = None
) -> Iterator[Entry]:
    """Yield an utterance, or pieces of equal length if it is too long.

    Pieces are named as in Kaldi, by utterance, start and end in 1/100 s, and have no
    transcript. Unreadable recordings, and segments that begin behind the end of theirs,
    stay whole, with Kaldi's -1 for the end.

    Args:
        entry: the utterance.
        seconds: of its recording, -1 where that is not known.
        max_seconds: of a piece.
        whole: seconds up to which an utterance is not cut, by default as long as a
            piece.
    """
    segment = entry.segment or Segment(entry.utt, 0.0, -1.0)
    start, end = segment.start, segment.end
    if end < 0 and seconds > start:
        end = seconds
    count = math.ceil((end - start) / max_seconds - 1e-6)
    if count <= 1 or end - start <= (whole or max_seconds):
        yield entry._replace(segment=segment._replace(end=end), samples=None)
        return
    step = (end - start) / count
    for index in range(count):
        first = start + index * step
        last = end if index == count - 1 else first + step
        piece = f"{entry.utt}-{round(first * 100):07d}-{round(last * 100):07d}"
        yield entry._replace(
            utt=piece,
            speaker=piece if entry.speaker == entry.utt else entry.speaker,
            segment=segment._replace(start=first, end=last),
            text=None,
            samples=None,
        )


class HoldOut:
    """Decides which recordings are held out for validation, by a hash of their ids.

    About ``fraction`` of the recordings of each domain are, but no more than so many
    hours of it (the others are trained on), and at least one of each domain that has
    two that can be read.

    Args:
        fraction: of the recordings.
        hours: of each domain.
    """

    def __init__(self, fraction: float, hours: float = math.inf) -> None:
        self.fraction = fraction
        self.chosen = {domain: Lowest(fraction, hours * 3600) for domain in DOMAINS}
        self._lowest = dict.fromkeys(DOMAINS, 2.0)
        self._highest = dict.fromkeys(DOMAINS, -1.0)

    def see(self, entry: Entry) -> None:
        """Take an utterance into account; one that cannot be read is not chosen."""
        if entry.segment.end < 0:
            return
        value, domain = self._value(entry.recording), entry.domain
        self._lowest[domain] = min(self._lowest[domain], value)
        self._highest[domain] = max(self._highest[domain], value)
        self.chosen[domain].add(value, entry.segment.end - entry.segment.start)

    def __contains__(self, entry: Entry) -> bool:
        value = self._value(entry.recording)
        return value < self.chosen[entry.domain].bound or any(
            value == low and self._highest[domain] > low >= self.fraction
            for domain, low in self._lowest.items()
        )

    def _value(self, recording: str) -> float:
        return hash_fraction(recording, "valid")


class Lowest:
    """The recordings of the lowest hashes that fit into a time; one at least.

    Memory: of those that fit.

    Args:
        bound: hashes are below it. What does not fit lowers it.
        seconds: that fit.
    """

    def __init__(self, bound: float, seconds: float) -> None:
        self.bound, self.limit, self.total = bound, seconds, 0.0
        self._seconds: dict[float, float] = {}
        self._highest: list[float] = []  # a heap, negated

    def add(self, value: float, seconds: float) -> None:
        """Add a piece of the recording of this hash."""
        if value >= self.bound or self.limit == math.inf:
            return
        if value not in self._seconds:
            self._seconds[value] = 0.0
            heapq.heappush(self._highest, -value)
        self._seconds[value] += seconds
        self.total += seconds
        while self.total > self.limit and len(self._highest) > 1:
            self.bound = -heapq.heappop(self._highest)
            self.total -= self._seconds.pop(self.bound)


class Quota:
    """Decides which utterances of a set are kept, in the order of a hash of their ids.

    Memory: 17 bytes an utterance while they are seen, 1 byte afterwards.

    Args:
        hours: of each domain; math.inf for all.
        count: of the set, the domains in turn; 0 for all.
    """

    def __init__(self, hours: Mapping[str, float], count: int) -> None:
        self._hours, self._count = hours, count
        self._keys, self._seconds = array("d"), array("d")
        self._domains = array("b")
        self._keep: np.ndarray | None = None
        self.needed = count > 0 or min(hours.values()) < math.inf

    def see(self, entry: Entry) -> None:
        """Take an utterance into account; they are numbered in this order."""
        if self.needed:
            self._keys.append(hash_fraction(entry.utt, "limit"))
            self._seconds.append(entry.segment.end - entry.segment.start)
            self._domains.append(DOMAINS.index(entry.domain))

    def keeps(self, number: int) -> bool:
        """Whether an utterance is kept, of which all have been seen."""
        if not self.needed:
            return True
        if self._keep is None:
            self._keep = self._decide()
            del self._keys, self._seconds, self._domains
        return bool(self._keep[number])

    def _decide(self) -> np.ndarray:
        keys, seconds = np.array(self._keys), np.array(self._seconds)
        domains = np.array(self._domains)
        keep = np.ones(len(keys), bool)
        queues = []
        for number, domain in enumerate(DOMAINS):
            mine = np.flatnonzero(domains == number)
            mine = mine[np.argsort(keys[mine], kind="stable")]
            total, bound = 0.0, self._hours[domain] * 3600
            if bound < math.inf:
                for i in mine:
                    keep[i] = total + seconds[i] <= bound
                    total += seconds[i] if keep[i] else 0.0
            queues.append(mine[keep[mine]])
        if self._count:
            ranks = np.concatenate([np.arange(len(queue)) for queue in queues])
            chosen = np.argsort(ranks, kind="stable")[: self._count]
            keep[:] = False
            keep[np.concatenate(queues)[chosen]] = True
        return keep


def positive(text: str) -> float:
    """Read a positive number."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: must be positive")
    return value


def longest_piece(piece: float, longest: float) -> float:
    """Seconds of the longest recording that is not cut.

    Args:
        piece: seconds of the pieces of longer ones.
        longest: seconds that stage 3 lets through.
    """
    return max(piece, min(STAYS_WHOLE * piece, longest))


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out_dir", type=Path, required=True, help="gets train, valid")
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], help="id lists")
    parser.add_argument("--valid_fraction", type=float, default=0.025)
    parser.add_argument(
        "--max_valid_hours", type=positive, default=math.inf, help="of each domain"
    )
    parser.add_argument("--max_piece_seconds", type=positive, default=10.0)
    parser.add_argument(
        "--max_seconds", type=positive, default=math.inf, help="that stage 3 keeps"
    )
    parser.add_argument("--max_hours_speech", type=float, default=math.inf)
    parser.add_argument("--max_hours_audio", type=float, default=math.inf)
    parser.add_argument("--max_utts", type=int, default=0, help="per set; 0: all")
    parser.add_argument("--nj", type=int, default=1, help="processes")
    parser.add_argument("sources", type=Path, nargs="+", help="data directories")
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Write the data directories train and valid."""
    excluded = {
        line.split()[0]
        for path in args.exclude
        for line in path.read_text().splitlines()
        if line.strip()
    }
    held = HoldOut(args.valid_fraction, args.max_valid_hours)
    piece = args.max_piece_seconds
    whole = longest_piece(piece, args.max_seconds)
    with ExternalSorter[Entry](folder=args.out_dir) as pieces:
        with ProcessPoolExecutor(args.nj) as pool:
            for source in args.sources:
                seconds = seconds_of(source, pool)
                for entry in entries(source, require=("utt2domain",)):
                    if entry.utt not in excluded:
                        for part in cut(entry, seconds(entry), piece, whole):
                            pieces.add(part)
                            held.see(part)
        write_sets(pieces, held, args)


def write_sets(
    pieces: ExternalSorter[Entry], held: HoldOut, args: argparse.Namespace
) -> None:
    """Write train and valid.

    Raises:
        DataDirError: nothing is held out, or an id is there twice.
    """
    hours = {domain: getattr(args, f"max_hours_{domain}") for domain in DOMAINS}
    limits = {
        "train": Quota(hours, args.max_utts),
        # A single recording may be longer than what is to be held out.
        "valid": Quota(dict.fromkeys(DOMAINS, args.max_valid_hours), args.max_utts),
    }
    sizes = dict.fromkeys(limits, 0)
    for piece in pieces:
        name = "valid" if piece in held else "train"
        limits[name].see(piece)
        sizes[name] += 1
    if not sizes["valid"]:
        raise DataDirError(
            f"{', '.join(map(str, args.sources))}: one recording of each domain is too "
            "few to hold some out for validation; add recordings, or cut them to files"
        )
    numbers = {name: count(0) for name in limits}
    totals = {(name, domain): [0, 0.0] for name in limits for domain in DOMAINS}
    with (
        entry_writer(args.out_dir / "train") as train,
        entry_writer(args.out_dir / "valid") as valid,
    ):
        writers = {"train": train, "valid": valid}
        for piece in pieces:
            name = "valid" if piece in held else "train"
            if limits[name].keeps(next(numbers[name])):
                writers[name].add(piece)
                total = totals[name, piece.domain]
                total[0] += 1
                total[1] += piece.segment.end - piece.segment.start
        for name, writer in writers.items():
            if not writer.count:
                raise DataDirError(
                    f"{args.out_dir}/{name}: no utterance is left for it; add data, or "
                    "change --valid_fraction, --max_hours_speech, --max_hours_audio"
                )
    summary: dict[str, dict[str, dict[str, float]]] = {name: {} for name in limits}
    for (name, domain), (number, seconds) in totals.items():
        summary[name][domain] = {"utterances": number, "seconds": round(seconds, 3)}
        bound, more = args.max_valid_hours, ""
        untouched = held.chosen[domain].bound == held.fraction
        if name == "valid" and number and untouched and bound < math.inf:
            more = f": all that is held out; --max_valid_hours {bound:g} allows more"
        logging.info(
            "%s: %d utterances of %s, %.1f min%s",
            *(name, number, domain, seconds / 60, more),
        )
    write_json(args.out_dir / "summary.json", summary)


if __name__ == "__main__":
    main()

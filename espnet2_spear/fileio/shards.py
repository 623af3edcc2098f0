"""Cut a long run into shards that a killed run need not compute again."""

from __future__ import annotations

import argparse
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    as_completed,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.atomic import write_json
from espnet2_spear.fileio.hashes import crc32_of, digest_of, digest_of_parts
from espnet2_spear.fileio.utterances import Batched, Utterance

SHARD_SECONDS = 600.0  # of audio, at least: what a killed run computes again
MOST_SHARDS = 10000  # of a run, unless it is told otherwise: files are three times that
SAY_SECONDS = 30.0  # between two lines about the progress
FOLDER_SHARDS = 1000  # in a folder
Batches = list[list[Utterance]]
Job = TypeVar("Job")
Result = TypeVar("Result")


class Shards:
    """Batches dealt out to shards, each made when asked for.

    Args:
        batches: of a run.
        count: of shards.
    """

    def __init__(self, batches: Batched, count: int) -> None:
        self.batches, self._count = batches, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Batches:
        if number >= self._count:
            raise IndexError(number)
        return [self.batches[i] for i in self._numbers(number)]

    def _numbers(self, number: int) -> range:
        return range(number, len(self.batches), self._count)

    def places(self, number: int) -> np.ndarray:
        """Places of a shard's utterances among all, batch after batch."""
        places = [self.batches.places(i) for i in self._numbers(number)]
        return np.concatenate([*places, np.zeros(0, np.int64)])

    def seconds(self, number: int) -> float:
        """Audio in a shard, in seconds; no utterance is read for it."""
        return float(self.batches.lengths[self.places(number)].sum()) / SAMPLE_RATE


def shard_count(seconds: float, shard_seconds: float | None) -> int:
    """Number of shards of so much audio, at least 1.

    Args:
        seconds: of audio in all.
        shard_seconds: in a shard; by default 600, or more for very much audio.
    """
    size = shard_seconds or max(SHARD_SECONDS, seconds / MOST_SHARDS)
    return max(1, round(seconds / size))


def shard_stem(name: str, shard: int) -> str:
    """Return the name of a shard's files without suffix, in a run's folder.

    The first thousand lie side by side, as ``codes.5``; then each has a folder, as
    ``1000/codes.1005``.

    Args:
        name: of all shards; may begin with a folder of theirs.
        shard: its number.
    """
    head, slash, last = name.rpartition("/")
    first = shard - shard % FOLDER_SHARDS
    return f"{head}{slash}{f'{first}/' if first else ''}{last}.{shard}"


def split_into_shards(batches: Batched, shard_seconds: float | None = None) -> Shards:
    """Deal batches out to shards of about ``shard_seconds`` of audio each.

    Every shard gets batches of all lengths, so that shards take equally long. It
    depends on nothing but the arguments: a resumed run finds the same shards.
    """
    seconds = float(batches.lengths.sum()) / SAMPLE_RATE
    count = max(1, min(shard_count(seconds, shard_seconds), len(batches)))
    return Shards(batches, count)


def fingerprint(facts: Mapping[str, Any], utterances: Iterable[Utterance]) -> str:
    """Return a hash by which a run knows outputs made from the same things.

    Args:
        facts: what the outputs depend on besides the utterances.
        utterances: in the order in which they are dealt out.
    """
    names = (repr(u).encode("utf-8", "backslashreplace") for u in utterances)
    return digest_of_parts(chain([digest_of(facts).encode()], names))


class JobShare(NamedTuple):
    """Every ``count``-th shard, beginning with number ``first`` (0 to count - 1)."""

    first: int = 0
    count: int = 1

    def has(self, shard: int) -> bool:
        """Whether a shard, numbered from 0, belongs to this part."""
        return shard % self.count == self.first


WHOLE_JOB = JobShare()


def parse_job_share(text: str) -> JobShare:
    """Read ``2/8``, the second of eight.

    Raises:
        argparse.ArgumentTypeError: anything else, also ``0/8`` and ``9/8``.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be like 2/8, the second of eight parts"
        )
    return JobShare(int(match[1]) - 1, int(match[2]))


def add_job_share_option(parser: argparse.ArgumentParser) -> None:
    """Give a parser the option ``--part``."""
    parser.add_argument(
        "--part",
        type=parse_job_share,
        metavar="J/N",
        help="as job J of N do only its share of the shards, and leave the results to "
        "a run without this option, which finds the shards of all jobs done",
    )


class DoneMarks:
    """The done marks ``NAME.<shard>.done`` of a run, see :func:`shard_stem`.

    A mark holds the run's fingerprint, a record of the shard, and the CRC-32 of every
    file that the shard wrote. A mark of another run, or whose files are gone or no
    longer what was written, counts as none.

    Args:
        folder: where shards and marks lie; made if it is not there.
        name: first part of the marks' names.
        run: fingerprint of the run.
    """

    def __init__(self, folder: str | Path, name: str, run: str) -> None:
        self.folder, self.name, self.run = Path(folder), name, run
        self.folder.mkdir(parents=True, exist_ok=True)

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard_stem(self.name, shard)}.done"

    def clear_stale(self, part: JobShare = WHOLE_JOB) -> int:
        """Remove the shards of runs with other inputs or options; return how many.

        Also those that lie where earlier versions put them.

        Only those of a part: another job may be writing the others at this moment.
        """
        stale = 0
        head, slash, last = self.name.rpartition("/")
        names = (f"{head}{slash}{between}{last}.*.done" for between in ("", "*/"))
        for path in [path for name in names for path in self.folder.glob(name)]:
            shard = path.name.split(".")[-2]
            if not shard.isdigit() or not part.has(int(shard)):
                continue
            mark = _read_mark(path)
            # Whatever reads the folder as a whole would take them for results.
            if mark.get("run") != self.run or path != self._path(int(shard)):
                for file in (*mark.get("files", ()), path):
                    (self.folder / file).unlink(missing_ok=True)
                stale += 1
        if stale:
            logging.info(
                f"{self.folder}: removed {stale} shards made from other inputs or with "
                "other options"
            )
        return stale

    def read(self, shard: int) -> Any:
        """Return the record of a finished shard, None if it is yet to be done."""
        mark = _read_mark(self._path(shard))
        if mark.get("run") != self.run:
            return None
        for file, crc32 in mark["files"].items():
            if crc32_of(self.folder / file) != crc32:
                logging.warning(
                    f"{self.folder / file}: gone or changed; its shard is made again"
                )
                return None
        return mark["record"]

    def records(
        self,
        shards: Shards,
        compute: Callable[[list[int]], Iterable[tuple[int, Any, Iterable[str | Path]]]],
        part: JobShare = WHOLE_JOB,
    ) -> list[Any]:
        """Return the records of all shards of a part; makes those that are not done.

        Args:
            shards: of the run.
            compute: makes shards, given by their numbers; yields number, record and
                files of each, in any order.
            part: shards that count.
        """
        records = {i: self.read(i) for i in range(len(shards)) if part.has(i)}
        todo = [i for i, record in records.items() if record is None]
        if len(todo) < len(records):
            done = len(records) - len(todo)
            logging.info(f"{done} of {len(records)} shards are done")
        progress = ProgressLog(sum(shards.seconds(i) for i in todo), "s of audio")
        for i, record, files in compute(todo):
            self.write(i, record, files)
            records[i] = record
            progress.add(shards.seconds(i))
        return list(records.values())

    def write(self, shard: int, record: Any, files: Iterable[str | Path]) -> None:
        """Mark a shard as finished.

        Args:
            shard: its number.
            record: anything that JSON can hold.
            files: what it has written, below the folder.
        """
        paths = [Path(file) for file in files]
        # Read again from the disk: what was written is not always what lies there.
        sums = {str(p.relative_to(self.folder)): crc32_of(p) for p in paths}
        mark = {"run": self.run, "record": record, "files": sums}
        write_json(self._path(shard), mark)


def _read_mark(path: Path) -> dict[str, Any]:
    """A mark's content; an empty one for what is missing, malformed or of old."""
    try:
        mark = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(mark, dict) and {"run", "record", "files"} <= mark.keys()
    return mark if whole else {}


class ProgressLog:
    """Log, at most every half minute, how far a run is and how long it will take.

    Args:
        total: what there is to do, without what was done before.
        unit: of that, such as "s of audio".
    """

    def __init__(self, total: float, unit: str) -> None:
        self.total, self.unit, self.done = total, unit, 0.0
        self._start = self._said = time.monotonic()

    def add(self, amount: float) -> None:
        """Count what was done."""
        self.done += amount
        now = time.monotonic()
        if now < self._said + SAY_SECONDS:
            return
        self._said = now
        rate = max(self.done, 1e-9) / (now - self._start)
        logging.info(
            f"{self.done:.0f} of {self.total:.0f} {self.unit}, {rate:.1f} a second, "
            f"{max(self.total - self.done, 0.0) / rate:.0f} s to go"
        )


def in_processes(
    pool: ProcessPoolExecutor,
    work: Callable[[Job], Result],
    jobs: Iterable[Job],
    nj: int,
    where: str | Path,
) -> Iterator[Result]:
    """Yield the results of jobs as the processes of a pool finish them.

    Args:
        pool: is shut down at the end.
        work: does a job.
        jobs: taken as they are needed, so that memory does not grow with their number.
        nj: number of processes.
        where: names the run in messages.

    Raises:
        RuntimeError: a process was killed.
    """
    running: set[Future[Result]] = set()
    with pool:
        try:
            for job in jobs:
                running.add(pool.submit(work, job))
                # Some wait, so that no process does while results are written.
                if len(running) >= 3 * nj:
                    ready, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in ready)
            yield from (future.result() for future in as_completed(running))
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"{where}: a process was killed, perhaps for lack of memory; run it "
                "again with a smaller --nj or --batch_seconds (finished shards are "
                "kept)"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise

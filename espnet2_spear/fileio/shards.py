"""Cut a long run into shards that a killed run need not compute again."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from espnet2_spear.fileio.part import WHOLE, Part
from espnet2_spear.fileio.utterances import Batched, Utterance

SHARD_SECONDS = 600.0  # of audio, at least: what a killed run computes again
MOST_SHARDS = 10000  # of a run, unless it is told otherwise: files are three times that
Batches = list[list[Utterance]]


class Described(Protocol):
    """What names the things that its outputs depend on: teachers, and students."""

    def describe(self) -> dict[str, Any]:
        """Return facts that JSON can hold."""


class Shards(Sequence[Batches]):
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
        return [self.batches[i] for i in self.numbers(number)]

    def seconds(self, number: int) -> float:
        """Audio in a shard, in seconds."""
        return self.batches.seconds(self.numbers(number))

    def numbers(self, number: int) -> range:
        """Which batches a shard has."""
        if not 0 <= number < self._count:
            raise IndexError(number)
        return range(number, len(self.batches), self._count)


def shard_count(seconds: float, shard_seconds: float | None) -> int:
    """Number of shards of so much audio, at least 1.

    Args:
        seconds: of audio in all.
        shard_seconds: in a shard; by default 600, or more for very much audio.
    """
    size = shard_seconds or max(SHARD_SECONDS, seconds / MOST_SHARDS)
    return max(1, round(seconds / size))


def deal(batches: Batched, shard_seconds: float | None = None) -> Shards:
    """Deal batches out to shards of about ``shard_seconds`` of audio each.

    Every shard gets batches of all lengths, so that shards take equally long. It
    depends on nothing but the arguments: a resumed run finds the same shards.
    """
    seconds = batches.seconds(range(len(batches)))
    count = max(1, min(shard_count(seconds, shard_seconds), len(batches)))
    return Shards(batches, count)


def fingerprint(
    model: Described, utterances: Iterable[Utterance], options: Mapping[str, Any]
) -> str:
    """Return a hash by which a run knows outputs made from the same things."""
    facts = {**model.describe(), **options}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for utterance in utterances:
        digest.update(repr(utterance).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


class DoneMarks:
    """The done marks ``NAME.<shard>.done`` of a run, in one folder.

    A mark holds the run's fingerprint and a record of the shard; a mark of another
    fingerprint counts as none.

    Args:
        folder: where shards and marks lie; made if it is not there.
        name: first part of the marks' names.
        run: fingerprint of the run.
    """

    def __init__(self, folder: str | Path, name: str, run: str) -> None:
        self.folder, self.name, self.run = Path(folder), name, run
        self.folder.mkdir(parents=True, exist_ok=True)

    def _path(self, shard: int) -> Path:
        return self.folder / f"{self.name}.{shard}.done"

    def clear_stale(self, part: Part = WHOLE) -> None:
        """Remove the shards of runs with other inputs or options, and say so.

        Only those of a part: another job may be writing the others at this moment.
        """
        stale = 0
        for path in self.folder.glob(f"{self.name}.*.done"):
            shard = path.name[len(self.name) + 1 : -len(".done")]
            if not shard.isdigit() or not part.has(int(shard)):
                continue
            if self.read(int(shard)) is None:
                for file in self.folder.glob(f"{self.name}.{shard}.*"):
                    file.unlink()
                stale += 1
        if stale:
            logging.info(
                f"{self.folder}: removed {stale} shards made from other inputs or with "
                "other options"
            )

    def read(self, shard: int) -> dict[str, Any] | None:
        """Return the record of a finished shard, None if it is yet to be done."""
        try:
            mark = json.loads(self._path(shard).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(mark, dict) or mark.get("run") != self.run:
            return None
        return mark["record"]

    def write(self, shard: int, record: Mapping[str, Any]) -> None:
        """Mark a shard as finished."""
        text = json.dumps({"run": self.run, "record": record}, indent=1)
        write_text(self._path(shard), text + "\n")


class Progress:
    """Log how far a run is, how fast, and how long it will take.

    Args:
        seconds: audio to go through, without what was done before.
        shards: number of shards to do.
    """

    def __init__(self, seconds: float, shards: int) -> None:
        self.total, self.shards = seconds, shards
        self.seconds, self.done = 0.0, 0
        self.start = time.monotonic()

    def add(self, seconds: float) -> None:
        """Count one more shard of so much audio."""
        self.seconds += seconds
        self.done += 1
        elapsed = max(time.monotonic() - self.start, 1e-3)
        left = elapsed * (self.total / max(self.seconds, 1e-9) - 1.0)
        logging.info(
            f"{self.done}/{self.shards} shards, {self.seconds:.0f} of "
            f"{self.total:.0f} s of audio, {self.seconds / elapsed:.1f} x real time, "
            f"{max(left, 0.0):.0f} s to go"
        )


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", errors="surrogateescape")
    part.replace(path)

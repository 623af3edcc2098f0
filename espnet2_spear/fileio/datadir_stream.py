"""Kaldi data directories of any size: utterance by utterance, in the order of ids.

What is kept in memory: 9 bytes a recording where there are segments, and the rows that
:class:`~espnet2_spear.fileio.external_sorter.ExternalSorter` sorts at a time.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Collection, Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from espnet2_spear.fileio.datadir import (
    Segment,
    check_domain,
    check_file,
    check_id,
    check_segment,
    missing_lines,
    parse_count,
    parse_segment,
    unknown_lines,
    write_feats_type,
)
from espnet2_spear.fileio.external_sorter import ExternalSorter, c_order
from espnet2_spear.fileio.tables import (
    DataDirError,
    Lookup,
    TableWriter,
    sorted_rows,
)

# Optional tables of utterances, and what their lines hold.
COLUMNS = {
    "utt2domain": "utterance domain",
    "text": "utterance transcript",
    "utt2num_samples": "utterance samples",
}


class Entry(NamedTuple):
    """What a data directory says of one utterance.

    Attributes:
        utt: its id.
        path: of the audio file.
        speaker: who is heard; the utterance's id where that is not known.
        domain: ``speech`` or ``audio``; empty where not given.
        segment: the piece of a recording that it is; None: a whole file.
        text: transcript, None where there is none.
        samples: at 16 kHz, None where not known yet.
        labels: for tagging, separated by spaces; not read back.
        part: of its corpus, such as a fold; empty where it does not count; not read
            back.
    """

    utt: str
    path: str
    speaker: str
    domain: str = ""
    segment: Segment | None = None
    text: str | None = None
    samples: int | None = None
    labels: str = ""
    part: str = ""

    @property
    def recording(self) -> str:
        """Id of the recording that it is taken from."""
        return self.utt if self.segment is None else self.segment.recording


class _Table:
    """Values of a table, taken in the order of the utterances."""

    def __init__(self, path: Path, columns: str, complete: bool) -> None:
        self.path, self.complete = path, complete
        self.columns, self.empty_values = columns, path.name == "text"
        self._rows = sorted_rows(path, columns, self.empty_values)
        self._row = next(self._rows, None)

    def take(self, utt: str) -> str | None:
        """Value of an utterance; raises _Disagreement."""
        if self._row is not None and self._row[0] == utt:
            value = self._row[1]
            self._row = next(self._rows, None)
            return value
        before = self._row is not None and c_order(self._row[0]) < c_order(utt)
        if self.complete or before:
            raise _Disagreement(self)
        return None

    def finish(self) -> None:
        """Raise _Disagreement if utterances are left."""
        if self._row is not None:
            raise _Disagreement(self)


class _Disagreement(Exception):
    def __init__(self, table: _Table) -> None:
        super().__init__()
        self.table = table

    def explain(self, utterances: Iterator[str]) -> DataDirError:
        """Count what is missing and what is unknown."""
        table = self.table
        own = sorted_rows(table.path, table.columns, table.empty_values)
        merged = heapq.merge(
            ((c_order(utt), 0) for utt in utterances),
            ((c_order(utt), 1) for utt, _ in own),
        )
        counts, examples = [0, 0], [b"", b""]
        for key, sides in groupby(merged, key=itemgetter(0)):
            found = [side for _, side in sides]
            if len(found) == 1:
                counts[found[0]] += 1
                examples[found[0]] = examples[found[0]] or key
        missing, unknown = (x.decode("utf-8", "surrogateescape") for x in examples)
        if counts[0] and table.complete:
            return missing_lines(table.path, counts[0], missing)
        return unknown_lines(table.path, counts[1], unknown)


def entries(
    path: str | os.PathLike[str], require: Collection[str] = ()
) -> Iterator[Entry]:
    """Yield the utterances of a data directory in the order of the C locale.

    Args:
        path: of the data directory.
        require: files that must list every utterance although they are optional:
            ``utt2domain``, ``text``, ``utt2num_samples``.

    Raises:
        DataDirError: a missing file, a malformed line, files that contradict each
            other. What the end of a file says comes up at the end: call
            :func:`check` first where that is too late.
    """
    path = Path(path)
    try:
        yield from _entries(path, require)
    except _Disagreement as error:
        raise error.explain(utt for utt, _, _ in _spans(path, None)) from None


def check(path: str | os.PathLike[str], require: Collection[str] = ()) -> int:
    """Read a whole data directory; returns the number of its utterances.

    Raises:
        DataDirError: see :func:`entries`.
    """
    return sum(1 for _ in entries(path, require))


def _spans(
    path: Path, lookup: Lookup | None
) -> Iterator[tuple[str, str, Segment | None]]:
    """Yield utterances with their files and segments."""
    if not (path / "segments").exists():
        for utt, file in sorted_rows(path / "wav.scp", "utterance file"):
            yield utt, file, None
        return
    for utt, rest in sorted_rows(
        path / "segments", "utterance recording start end [channel]"
    ):
        segment = parse_segment(path, utt, rest)
        if lookup is None:
            yield utt, "", segment
            continue
        found = lookup.find(segment.recording)
        if found is None:
            raise _absent_recordings(path, lookup)
        yield utt, found[1], segment


def _absent_recordings(path: Path, lookup: Lookup) -> DataDirError:
    spans = _spans(path, None)
    absent = {s.recording for _, _, s in spans if s and not lookup.find(s.recording)}
    return missing_lines(path / "wav.scp", len(absent), min(absent), "recording")


def _entries(path: Path, require: Collection[str]) -> Iterator[Entry]:
    lookup = None
    if (path / "segments").exists():
        lookup = Lookup(path / "wav.scp", "recording file")
    speakers = _Table(path / "utt2spk", "utterance speaker", True)
    optional: list[_Table | None] = []
    for name, columns in COLUMNS.items():
        there = (path / name).exists()
        if not there and name in require:
            utterances = [utt for utt, _, _ in _spans(path, lookup)]
            raise missing_lines(path / name, len(utterances), utterances[0])
        complete = name in require or name != "text"
        optional.append(_Table(path / name, columns, complete) if there else None)
    domains, texts, samples = optional
    count = 0
    for utt, file, segment in _spans(path, lookup):
        check_id(path, utt)
        if segment is not None:
            check_id(path, segment.recording)
            check_segment(path, utt, segment)
        check_file(path, segment.recording if segment else utt, file)
        speaker = speakers.take(utt)
        domain = domains.take(utt) if domains else None
        if domain is not None:
            check_domain(path, utt, domain)
        text = texts.take(utt) if texts else None
        number = samples.take(utt) if samples else None
        length = None if number is None else parse_count(path, utt, number)
        count += 1
        yield Entry(utt, file, speaker or utt, domain or "", segment, text, length)
    for table in (speakers, *optional):
        if table is not None:
            table.finish()
    if lookup is not None:
        unused, example = lookup.unused()
        if unused:
            raise unknown_lines(path / "wav.scp", unused, example, "recording")
        lookup.close()
    if not count:
        raise DataDirError(
            f"{path}: the data directory has no utterances; prepare it again (stage 1)"
        )


def _same_id(key: str, first: str, second: str) -> DataDirError:
    return DataDirError(
        f"the id '{key}' is in both {first} and {second}; give the utterances of one "
        "of them a prefix of their own, or keep one"
    )


class EntryWriter:
    """Writes a data directory of entries that come in the order of their ids.

    Use it as a context: its files appear at the end, wav.scp last, or not at all.
    Files of an earlier version that are no longer needed are removed. Where an entry
    has labels or a part, a file ``labels`` or ``splits`` is written.

    Args:
        path: of the data directory; made if it is not there.
        feats_type: ``raw`` where the audio is in its final form, as ESPnet's scripts
            expect it of a set in dump/raw.

    Attributes:
        count: entries written.
    """

    def __init__(self, path: str | os.PathLike[str], feats_type: str = "") -> None:
        self.path, self.feats_type = Path(path), feats_type
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "wav.scp").unlink(missing_ok=True)
        names = (
            "segments",
            "utt2spk",
            *COLUMNS,
            "labels",
            "splits",
            "spk2utt",
            "wav.scp",
        )
        self._tables = {name: TableWriter(self.path / name) for name in names}
        self._speakers = ExternalSorter[tuple[str, str]](folder=self.path)
        self._recordings = ExternalSorter[tuple[str, str]](folder=self.path)
        self._last: Entry | None = None
        self.count = 0

    def add(self, entry: Entry) -> None:
        """Write an utterance.

        Raises:
            DataDirError: its id is that of the one before, or only one of them is a
                segment.
            ValueError: not in the order of ids.
        """
        last = self._last
        if last is not None:
            if entry.utt == last.utt:
                raise _same_id(entry.utt, last.path, entry.path)
            if c_order(entry.utt) < c_order(last.utt):
                raise ValueError(f"{entry.utt} after {last.utt}: not in order")
            if (entry.segment is None) != (last.segment is None):
                raise DataDirError(
                    f"cannot join with and without segments: {last.path}, {entry.path}"
                )
        values = {
            "utt2spk": entry.speaker,
            "utt2domain": entry.domain or None,
            "text": entry.text,
            "utt2num_samples": entry.samples,
            "labels": entry.labels or None,
            "splits": entry.part or None,
        }
        if entry.segment is None:
            values["wav.scp"] = entry.path
        else:
            values["segments"] = entry.segment.line()
            row = entry.recording, entry.path
            if last is None or row != (last.recording, last.path):
                self._recordings.add(row)
        for name, value in values.items():
            if value is not None:
                self._tables[name].add(entry.utt, value)
        self._speakers.add((entry.speaker, entry.utt))
        self._last = entry
        self.count += 1

    def _finish(self) -> None:
        write_feats_type(self.path, self.feats_type)
        for speaker, group in groupby(self._speakers, key=itemgetter(0)):
            self._tables["spk2utt"].add_words(speaker, (utt for _, utt in group))
        before = ("", "")
        for row in self._recordings:
            if row[0] == before[0] and row[1] != before[1]:
                raise _same_id(row[0], before[1], row[1])
            if row != before:
                self._tables["wav.scp"].add(*row)
            before = row
        for table in self._tables.values():
            if table.lines:
                table.finish()
            else:
                table.discard()
                table.path.unlink(missing_ok=True)

    def __enter__(self) -> EntryWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for table in self._tables.values():
                table.discard()
            self._speakers.close()
            self._recordings.close()


def write_entries(found: Iterable[Entry], path: str | os.PathLike[str]) -> int:
    """Write a data directory of sorted entries; returns their number.

    Raises:
        DataDirError: see :class:`EntryWriter`.
    """
    with EntryWriter(path) as writer:
        for entry in found:
            writer.add(entry)
        return writer.count

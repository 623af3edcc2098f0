"""Kaldi data directories: a stream of utterances in the order of their ids.

What is kept in memory are the rows that
:class:`~espnet2_spear.fileio.external_sorter.ExternalSorter` sorts at a time, whatever
the size of the directory.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from espnet2_spear.fileio.atomic import write_atomically
from espnet2_spear.fileio.audio import Span
from espnet2_spear.fileio.external_sorter import ExternalSorter, c_order
from espnet2_spear.fileio.tables import (
    DataDirError,
    Lines,
    difference_of,
    join,
    rows,
    sorted_rows,
    table_writer,
)

DOMAINS = ("speech", "audio")
# Content of ESPnet's `feats_type` in a set whose wav.scp names files in its final form.
RAW = "raw"
# Tables of utterances beside wav.scp and segments, and what their lines hold.
COLUMNS = {
    "utt2spk": "utterance speaker",
    "utt2domain": "utterance domain",
    "text": "utterance transcript",
    "utt2num_samples": "utterance samples",
}
SEGMENTS = "utterance recording start end [channel]"


class Segment(NamedTuple):
    """A piece of a recording, a line of Kaldi's ``segments``.

    Attributes:
        recording: its id in wav.scp.
        start: in seconds.
        end: in seconds; -1: to the end of the recording.
        channel: from 0; None: the mean of all channels.
    """

    recording: str
    start: float
    end: float
    channel: int | None = None

    @property
    def span(self) -> Span:
        """The piece as :func:`~espnet2_spear.fileio.audio.read_pieces` takes it."""
        return Span(self.start, None if self.end < 0 else self.end, self.channel)

    def line(self) -> str:
        """The columns of ``segments`` behind the utterance's id."""
        channel = "" if self.channel is None else f" {self.channel}"
        return f"{self.recording} {self.start:.6f} {self.end:.6f}{channel}"


class Entry(NamedTuple):
    """One utterance of a data directory.

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


# --- Reading --------------------------------------------------------------------------


def entries(
    path: str | os.PathLike[str], require: Collection[str] = ()
) -> Iterator[Entry]:
    """Yield the utterances of a data directory in the order of the C locale.

    Recordings that no segment is taken from are left out.

    Args:
        path: of the data directory.
        require: files that must list every utterance although they are optional:
            ``utt2domain``, ``text``, ``utt2num_samples``.

    Raises:
        DataDirError: a missing file, a malformed line, files that contradict each
            other. What the end of a file says comes up at the end: call
            :func:`check` first where that is too late.
    """
    path, find = Path(path), None
    tables = {
        name: sorted_rows(path / name, columns, empty_values=name == "text")
        for name, columns in COLUMNS.items()
        if name == "utt2spk" or (path / name).exists()
    }
    complete = {name for name in tables if name != "text"} | {*require}
    if (path / "segments").exists():
        find = Lines.by_key(path / "wav.scp", "recording file").find
        utterances = sorted_rows(path / "segments", SEGMENTS)
    else:
        utterances = sorted_rows(path / "wav.scp", "utterance file")
    count = 0
    others = (tables.get(name, ()) for name in COLUMNS)
    for utt, (first, *found) in join(utterances, *others):
        count += 1
        for name, row in zip(COLUMNS, found, strict=True):
            if first is None:
                if row is not None:
                    raise difference_of(path / name, utt, missing=False)
            elif row is None and name in complete:
                raise difference_of(path / name, utt, missing=True)
        file, segment = first[1], None
        if find is not None:
            segment = _parse_segment(path, utt, first[1])
            file = find(segment.recording)
            if file is None:
                raise DataDirError(
                    f"{path}/wav.scp: recording '{segment.recording}' of utterance "
                    f"'{utt}' is missing; add its line, or remove the utterance from "
                    "the other files"
                )
        speaker, domain, text, samples = (row and row[1] for row in found)
        if samples is not None:
            samples = parse_count(path / "utt2num_samples", utt, samples)
        entry = Entry(utt, file, speaker, domain or "", segment, text, samples)
        _check_entry(path, entry)
        yield entry
    if not count:
        raise DataDirError(
            f"{path}: the data directory has no utterances; prepare it again (stage 1)"
        )


def check(path: str | os.PathLike[str], require: Collection[str] = ()) -> int:
    """Read a whole data directory; returns the number of its utterances.

    Raises:
        DataDirError: see :func:`entries`.
    """
    return sum(1 for _ in entries(path, require))


def _parse_segment(path: Path, utt: str, rest: str) -> Segment:
    """Read what a line of segments holds behind the utterance's id."""
    try:
        recording, start, end, *channel = rest.split()
        numbers = map(int, channel)  # of Kaldi's optional last column
        return Segment(recording, float(start), float(end), *numbers)
    except (TypeError, ValueError):
        raise DataDirError(
            f"{path}/segments: the line of utterance '{utt}' should be 'utterance "
            "recording start end [channel]' with times in seconds and channels from "
            f"0, found '{utt} {rest}'"
        ) from None


def parse_count(file: str | Path, utt: str, value: str) -> int:
    """Read a value of utt2num_samples.

    Raises:
        DataDirError: it is no number, or none that four bytes hold.
    """
    count = int(value) if value.isdecimal() else -1
    if not 0 <= count < 1 << 31:
        raise DataDirError(
            f"{file}: utterance '{utt}' has {value!r} instead of a number of samples; "
            "remove the file and run stages 2 and 3 again"
        )
    return count


def _check_entry(path: Path, entry: Entry) -> None:
    """Raise DataDirError for what cannot be used of an utterance."""
    utt, segment = entry.utt, entry.segment
    for name in {utt, entry.recording}:
        if any("\udc80" <= character <= "\udcff" for character in name):
            raise DataDirError(
                f"{path}: the id {name!r} is not UTF-8, which ESPnet reads ids as; "
                "convert the tables to UTF-8 (names of audio files may be as they are)"
            )
        if "/" in name or name in (".", ".."):
            raise DataDirError(
                f"{path}: the id '{name}' cannot name a file; replace '/' in ids, e.g. "
                "by '-'"
            )
    if entry.path.endswith("|"):
        raise DataDirError(
            f"{path}/wav.scp: '{entry.recording}' is a command; commands in data files "
            "are not run: decode to files and give their paths"
        )
    if segment and not (0 <= segment.start < segment.end or segment.end == -1):
        raise DataDirError(
            f"{path}/segments: utterance '{utt}' goes from {segment.start} to "
            f"{segment.end} s; the start must be at least 0 and before the end (-1: to "
            "the end of the recording)"
        )
    if entry.domain not in ("", *DOMAINS):
        raise DataDirError(
            f"{path}/utt2domain: utterance '{utt}' has domain '{entry.domain}'; "
            f"the domains are {' and '.join(DOMAINS)}"
        )


# --- Writing --------------------------------------------------------------------------


class EntryWriter:
    """Writes the tables of a data directory; see :func:`entry_writer`.

    Args:
        path: of the data directory.
        stack: closes the tables.

    Attributes:
        tables: by their names.
        count: entries written.
    """

    def __init__(self, path: Path, stack: ExitStack) -> None:
        # What is opened first is closed, and so appears, last.
        names = ("wav.scp", "segments", *COLUMNS, "spk2utt", "labels", "splits")
        self.tables = {n: stack.enter_context(table_writer(path / n)) for n in names}
        self._speakers, self._recordings = (
            stack.enter_context(ExternalSorter[tuple[str, str]](folder=path))
            for _ in range(2)
        )
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
                self.tables[name].add(entry.utt, value)
        self._speakers.add((entry.speaker, entry.utt))
        self._last = entry
        self.count += 1

    def finish(self) -> None:
        """Write what depends on all utterances."""
        for speaker, group in groupby(self._speakers, key=itemgetter(0)):
            self.tables["spk2utt"].add_words(speaker, (utt for _, utt in group))
        before = ("", "")
        for row in self._recordings:
            if row[0] == before[0] and row[1] != before[1]:
                raise _same_id(row[0], before[1], row[1])
            if row != before:
                self.tables["wav.scp"].add(*row)
            before = row


def _same_id(key: str, first: str, second: str) -> DataDirError:
    return DataDirError(
        f"the id '{key}' is in both {first} and {second}; give the utterances of one "
        "of them a prefix of their own, or keep one"
    )


@contextmanager
def entry_writer(
    path: str | os.PathLike[str], feats_type: str = ""
) -> Iterator[EntryWriter]:
    """Write a data directory of entries that come in the order of their ids.

    Its files appear at the end of the context, wav.scp last, or not at all. Files of an
    earlier version that are no longer needed are removed. Where an entry has labels or
    a part, a file ``labels`` or ``splits`` is written.

    Args:
        path: of the data directory; made if it is not there.
        feats_type: ``raw`` where the audio is in its final form, as ESPnet's scripts
            expect it of a set in dump/raw.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / "wav.scp").unlink(missing_ok=True)
    with ExitStack() as stack:
        writer = EntryWriter(path, stack)
        yield writer
        writer.finish()
        (path / "feats_type").unlink(missing_ok=True)
        if feats_type:
            write_atomically(path / "feats_type", f"{feats_type}\n".encode())
    for name, table in writer.tables.items():
        if not table.lines:
            (path / name).unlink()


def write_entries(
    found: Iterable[Entry], path: str | os.PathLike[str], feats_type: str = ""
) -> int:
    """Write a data directory of sorted entries; returns their number.

    Raises:
        DataDirError: see :meth:`EntryWriter.add`.
    """
    with entry_writer(path, feats_type) as writer:
        for entry in found:
            writer.add(entry)
        return writer.count


def check_other_folder(in_dir: Path, out_dir: Path) -> None:
    """Refuse to write a data directory over the one that it is made of.

    Raises:
        DataDirError: both are the same folder.
    """
    if in_dir.exists() and out_dir.exists() and in_dir.samefile(out_dir):
        raise DataDirError(f"--out_dir {out_dir}: is --in_dir, too; name another")


# --- In memory ------------------------------------------------------------------------


def read_table(path: Path, columns: str, empty_values: bool = False) -> dict[str, str]:
    """Read ``key value`` lines; the value is the rest of the line.

    Args:
        path: File to read.
        columns: Names of the columns, for messages.
        empty_values: Whether a line may consist of the key alone.

    Raises:
        DataDirError: missing file, malformed line, repeated key.
    """
    table: dict[str, str] = {}
    for number, (key, value, _) in enumerate(rows(path, columns, empty_values), 1):
        if key in table:
            raise DataDirError(
                f"{path}, line {number}: '{key}' appears twice; keep one of its lines"
            )
        table[key] = value
    return table


def write_table(path: Path, table: Mapping[str, object]) -> None:
    """Write sorted ``key value`` lines; the file appears complete or not at all."""
    with table_writer(path) as writer:
        for key in sorted(table, key=c_order):
            writer.add(key, table[key])

"""Kaldi data directories in memory: reading, checking, selecting and writing.

Those of millions of utterances are read and written by
:mod:`espnet2_spear.fileio.datadir_stream`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from espnet2_spear.fileio.external_sorter import c_order
from espnet2_spear.fileio.tables import DataDirError, TableWriter, rows

DOMAINS = ("speech", "audio")
# Content of ESPnet's `feats_type` in a set whose wav.scp names files in its final form.
RAW = "raw"


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

    def line(self) -> str:
        """What ``segments`` holds behind the utterance's id."""
        channel = "" if self.channel is None else f" {self.channel}"
        return f"{self.recording} {self.start:.6f} {self.end:.6f}{channel}"


@dataclass
class DataDir:
    """One data set in Kaldi's form.

    Attributes:
        wav_scp: Recording -> audio file (without segments: utterance -> audio file).
        segments: Utterance -> piece of a recording, or None where each recording is
            one utterance.
        utt2spk: Utterance -> speaker.
        utt2domain: Utterance -> ``speech`` or ``audio``; empty where not given.
        text: Utterance -> transcript, for the utterances that have one.
        utt2num_samples: Utterance -> samples; empty where not known yet.
        feats_type: What ESPnet's scripts read of a formatted set, ``raw``; empty
            where there is no such file.
        path: Where it was read from, for messages.
    """

    wav_scp: dict[str, str]
    utt2spk: dict[str, str]
    segments: dict[str, Segment] | None = None
    utt2domain: dict[str, str] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)
    utt2num_samples: dict[str, int] = field(default_factory=dict)
    feats_type: str = ""
    path: Path = Path(".")

    @property
    def utterances(self) -> list[str]:
        """Utterance ids, sorted as in the C locale."""
        ids = self.wav_scp if self.segments is None else self.segments
        return sorted(ids, key=c_order)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DataDir:
        """Read a directory; files other than wav.scp and utt2spk are optional.

        Raises:
            DataDirError: a missing file, a malformed line or a repeated key.
        """
        path = Path(path)
        segments = None
        if (path / "segments").exists():
            table = read_table(path / "segments", "utterance recording start end")
            segments = {
                utt: parse_segment(path, utt, rest) for utt, rest in table.items()
            }
        return cls(
            wav_scp=read_table(path / "wav.scp", "utterance file"),
            utt2spk=read_table(path / "utt2spk", "utterance speaker"),
            segments=segments,
            utt2domain=_optional(path / "utt2domain", "utterance domain"),
            text=_optional(path / "text", "utterance transcript", empty_values=True),
            utt2num_samples={
                utt: parse_count(path, utt, value)
                for utt, value in _optional(
                    path / "utt2num_samples", "utterance samples"
                ).items()
            },
            feats_type=read_feats_type(path),
            path=path,
        )

    def validate(self, require: Iterable[str] = ()) -> None:
        """Check that the files agree with each other.

        Args:
            require: Files that must list every utterance although they are optional:
                ``utt2domain``, ``text``, ``utt2num_samples``.

        Raises:
            DataDirError: naming the file, an example and the remedy.
        """
        utterances = set(self.utterances)
        if not utterances:
            raise DataDirError(
                f"{self.path}: the data directory has no utterances; "
                "prepare it again (stage 1)"
            )
        if self.segments is not None:
            recordings = {segment.recording for segment in self.segments.values()}
            _agree(self.path, "wav.scp", set(self.wav_scp), recordings, "recording")
            for utt, segment in self.segments.items():
                check_segment(self.path, utt, segment)
        for recording, file in self.wav_scp.items():
            check_file(self.path, recording, file)
        _agree(self.path, "utt2spk", set(self.utt2spk), utterances)
        for name in ("utt2domain", "text", "utt2num_samples"):
            keys = set(getattr(self, name))
            if name in require or (keys and name != "text"):
                _agree(self.path, name, keys, utterances)
            elif keys - utterances:
                extra = keys - utterances
                raise unknown_lines(self.path / name, len(extra), min(extra))
        for utt, domain in self.utt2domain.items():
            check_domain(self.path, utt, domain)
        for utt in utterances | set(self.wav_scp):
            check_id(self.path, utt)

    def select(self, utterances: Iterable[str]) -> DataDir:
        """Return a copy with these utterances (and the recordings they need)."""
        keep = set(utterances)
        segments = None
        recordings = keep
        if self.segments is not None:
            segments = {utt: s for utt, s in self.segments.items() if utt in keep}
            recordings = {segment.recording for segment in segments.values()}
        return replace(
            self,
            wav_scp=_only(self.wav_scp, recordings),
            segments=segments,
            utt2spk=_only(self.utt2spk, keep),
            utt2domain=_only(self.utt2domain, keep),
            text=_only(self.text, keep),
            utt2num_samples=_only(self.utt2num_samples, keep),
        )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write all files, sorted as in the C locale, with spk2utt; files of an
        earlier version that are no longer needed are removed.

        wav.scp is written last, so that a directory with wav.scp is complete.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        (path / "wav.scp").unlink(missing_ok=True)
        write_feats_type(path, self.feats_type)
        spk2utt: dict[str, list[str]] = {}
        for utt in self.utterances:
            spk2utt.setdefault(self.utt2spk[utt], []).append(utt)
        tables: dict[str, Mapping[str, object]] = {
            "utt2spk": self.utt2spk,
            "spk2utt": {spk: " ".join(utts) for spk, utts in spk2utt.items()},
            "utt2domain": self.utt2domain,
            "text": self.text,
            "utt2num_samples": self.utt2num_samples,
            "segments": {utt: s.line() for utt, s in (self.segments or {}).items()},
            "wav.scp": self.wav_scp,
        }
        for name, table in tables.items():
            if table:
                write_table(path / name, table)
            else:
                (path / name).unlink(missing_ok=True)


def read_feats_type(path: Path) -> str:
    """Return what a data directory's ``feats_type`` says, "" where there is none."""
    file = path / "feats_type"
    return file.read_text(encoding="utf-8").strip() if file.exists() else ""


def write_feats_type(path: Path, feats_type: str) -> None:
    """Write a data directory's ``feats_type``, or remove it where it is empty."""
    if feats_type:
        (path / "feats_type").write_text(f"{feats_type}\n", encoding="utf-8")
    else:
        (path / "feats_type").unlink(missing_ok=True)


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
    for number, (key, value) in enumerate(rows(path, columns, empty_values), 1):
        if key in table:
            raise DataDirError(
                f"{path}, line {number}: '{key}' appears twice; keep one of its lines"
            )
        table[key] = value
    return table


def write_table(path: Path, table: Mapping[str, object]) -> None:
    """Write sorted ``key value`` lines; the file appears complete or not at all."""
    writer = TableWriter(path)
    try:
        for key in sorted(table, key=c_order):
            writer.add(key, table[key])
        writer.finish()
    except BaseException:
        writer.discard()
        raise


def _optional(path: Path, columns: str, empty_values: bool = False) -> dict[str, str]:
    return read_table(path, columns, empty_values) if path.exists() else {}


def _only(table: Mapping[str, object], keep: set[str]) -> dict:
    return {key: value for key, value in table.items() if key in keep}


def check_segment(path: Path, utt: str, segment: Segment) -> None:
    """Raise DataDirError unless a segment has a length."""
    start, end = segment.start, segment.end
    if not (0 <= start and (start < end or end == -1)):
        raise DataDirError(
            f"{path}/segments: utterance '{utt}' goes from {start} to {end} s; the "
            "start must be at least 0 and before the end (-1: to the end of the "
            "recording)"
        )


def check_file(path: Path, recording: str, file: str) -> None:
    """Raise DataDirError for a command in wav.scp."""
    if file.endswith("|"):
        raise DataDirError(
            f"{path}/wav.scp: '{recording}' is a command; commands in data files are "
            "not run: decode to files and give their paths"
        )


def check_domain(path: Path, utt: str, domain: str) -> None:
    """Raise DataDirError for an unknown domain."""
    if domain not in DOMAINS:
        raise DataDirError(
            f"{path}/utt2domain: utterance '{utt}' has domain '{domain}'; "
            f"the domains are {' and '.join(DOMAINS)}"
        )


def check_id(path: Path, utt: str) -> None:
    """Raise DataDirError for an id that could not name a file, or is not UTF-8."""
    if any("\udc80" <= character <= "\udcff" for character in utt):
        raise DataDirError(
            f"{path}: the id {utt!r} is not UTF-8, which ESPnet reads ids as; convert "
            "the tables to UTF-8 (names of audio files may be as they are)"
        )
    if "/" in utt or utt in (".", ".."):
        raise DataDirError(
            f"{path}: the id '{utt}' cannot name a file; "
            "replace '/' in ids, e.g. by '-'"
        )


def parse_segment(path: Path, utt: str, rest: str) -> Segment:
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


def parse_count(path: Path, utt: str, value: str) -> int:
    """Read a value of utt2num_samples."""
    if not value.isdecimal():
        raise DataDirError(
            f"{path}/utt2num_samples: utterance '{utt}' has {value!r} instead of a "
            "number of samples; remove the file and run stages 2 and 3 again"
        )
    return int(value)


def _agree(
    path: Path, name: str, keys: set[str], expected: set[str], what: str = "utterance"
) -> None:
    missing = expected - keys
    if missing:
        raise missing_lines(path / name, len(missing), min(missing), what)
    if extra := keys - expected:
        raise unknown_lines(path / name, len(extra), min(extra), what)


def missing_lines(
    path: Path, count: int, example: str, what: str = "utterance"
) -> DataDirError:
    """The error of utterances (or recordings) that a table lacks."""
    return DataDirError(
        f"{path}: {count} {what}s are missing, e.g. '{example}'; "
        "add their lines, or remove them from the other files"
    )


def unknown_lines(
    path: Path, count: int, example: str, what: str = "utterance"
) -> DataDirError:
    """The error of utterances (or recordings) that no other table has."""
    return DataDirError(
        f"{path}: {count} {what}s are in no other file, e.g. '{example}'; remove "
        "their lines, or add them to the other files"
    )

"""Kaldi data directories: reading, checking, selecting, joining and writing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

DOMAINS = ("speech", "audio")
# Paths and ids need not be valid UTF-8: undecodable bytes survive a round trip.
_TEXT = {"encoding": "utf-8", "errors": "surrogateescape"}


class DataDirError(ValueError):
    """A data directory is inconsistent; the message names file, line and remedy."""


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
        path: Where it was read from, for messages.
    """

    wav_scp: dict[str, str]
    utt2spk: dict[str, str]
    segments: dict[str, Segment] | None = None
    utt2domain: dict[str, str] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)
    utt2num_samples: dict[str, int] = field(default_factory=dict)
    path: Path = Path(".")

    @property
    def utterances(self) -> list[str]:
        """Utterance ids, sorted as in the C locale."""
        return sorted(self.wav_scp if self.segments is None else self.segments)

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
            segments = {utt: _segment(path, utt, rest) for utt, rest in table.items()}
        return cls(
            wav_scp=read_table(path / "wav.scp", "utterance file"),
            utt2spk=read_table(path / "utt2spk", "utterance speaker"),
            segments=segments,
            utt2domain=_optional(path / "utt2domain", "utterance domain"),
            text=_optional(path / "text", "utterance transcript", empty_values=True),
            utt2num_samples={
                utt: _count(path, utt, value)
                for utt, value in _optional(
                    path / "utt2num_samples", "utterance samples"
                ).items()
            },
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
            for utt, (_, start, end, _) in self.segments.items():
                if not (0 <= start and (start < end or end == -1)):
                    raise DataDirError(
                        f"{self.path}/segments: utterance '{utt}' goes from {start} to "
                        f"{end} s; the start must be at least 0 and before the end "
                        "(-1: to the end of the recording)"
                    )
        for recording, file in self.wav_scp.items():
            if file.endswith("|"):
                raise DataDirError(
                    f"{self.path}/wav.scp: '{recording}' is a command; commands in "
                    "data files are not run: decode to files and give their paths"
                )
        _agree(self.path, "utt2spk", set(self.utt2spk), utterances)
        for name in ("utt2domain", "text", "utt2num_samples"):
            keys = set(getattr(self, name))
            if name in require or (keys and name != "text"):
                _agree(self.path, name, keys, utterances)
            elif keys - utterances:
                _unknown(self.path, name, keys - utterances)
        for utt, domain in self.utt2domain.items():
            if domain not in DOMAINS:
                raise DataDirError(
                    f"{self.path}/utt2domain: utterance '{utt}' has domain '{domain}'; "
                    f"the domains are {' and '.join(DOMAINS)}"
                )
        for utt in utterances | set(self.wav_scp):
            if "/" in utt or utt in (".", ".."):
                raise DataDirError(
                    f"{self.path}: the id '{utt}' cannot name a file; "
                    "replace '/' in ids, e.g. by '-'"
                )

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


def combine(parts: Iterable[DataDir]) -> DataDir:
    """Join data sets, all with segments or all without, that share no id.

    Raises:
        DataDirError: an utterance or recording id occurs in two parts, or only some
            parts have segments.
    """
    parts = list(parts)
    result = DataDir(wav_scp={}, utt2spk={})
    if any(part.segments is not None for part in parts):
        if any(part.segments is None for part in parts):
            names = ", ".join(str(part.path) for part in parts)
            raise DataDirError(f"cannot join with and without segments: {names}")
        result.segments = {}
    owner: dict[str, Path] = {}
    for part in parts:
        for key in {*part.wav_scp, *part.utt2spk}:
            if key in owner:
                raise DataDirError(
                    f"id '{key}' is in both {owner[key]} and {part.path}; "
                    "give the utterances of one of them a prefix of their own"
                )
            owner[key] = part.path
        result.wav_scp.update(part.wav_scp)
        result.utt2spk.update(part.utt2spk)
        result.utt2domain.update(part.utt2domain)
        result.text.update(part.text)
        if all(other.utt2num_samples for other in parts):
            result.utt2num_samples.update(part.utt2num_samples)
        if result.segments is not None and part.segments is not None:
            result.segments.update(part.segments)
    return result


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
    try:
        lines = open(path, **_TEXT)
    except OSError as error:
        raise DataDirError(
            f"{path}: cannot be read ({error.strerror}); "
            "it is part of every data directory: run the stage that writes it"
        ) from error
    with lines:
        for number, line in enumerate(lines, 1):
            fields = line.strip().split(maxsplit=1)
            if len(fields) == 1 and empty_values:
                fields.append("")
            if len(fields) != 2:
                raise DataDirError(
                    f"{path}, line {number}: expected '{columns}', found "
                    f"{line.strip()!r}; correct or remove the line"
                )
            key, value = fields
            if key in table:
                raise DataDirError(
                    f"{path}, line {number}: '{key}' appears twice; "
                    "keep one of its lines"
                )
            table[key] = value
    return table


def write_table(path: Path, table: Mapping[str, object]) -> None:
    """Write sorted ``key value`` lines; the file appears complete or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", **_TEXT) as out:
            for key in sorted(table):
                out.write(f"{key} {table[key]}".rstrip() + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _optional(path: Path, columns: str, empty_values: bool = False) -> dict[str, str]:
    return read_table(path, columns, empty_values) if path.exists() else {}


def _only(table: Mapping[str, object], keep: set[str]) -> dict:
    return {key: value for key, value in table.items() if key in keep}


def _segment(path: Path, utt: str, rest: str) -> Segment:
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


def _count(path: Path, utt: str, value: str) -> int:
    if not value.isdecimal():
        raise DataDirError(
            f"{path}/utt2num_samples: utterance '{utt}' has {value!r} instead of a "
            "number of samples; remove the file and run stages 2 and 3 again"
        )
    return int(value)


def _agree(
    path: Path, name: str, keys: set[str], expected: set[str], what: str = "utterance"
) -> None:
    missing = sorted(expected - keys)
    if missing:
        raise DataDirError(
            f"{path}/{name}: {len(missing)} {what}s are missing, e.g. '{missing[0]}'; "
            "add their lines, or remove them from the other files"
        )
    if keys - expected:
        _unknown(path, name, keys - expected, what)


def _unknown(path: Path, name: str, keys: set[str], what: str = "utterance") -> None:
    raise DataDirError(
        f"{path}/{name}: {len(keys)} {what}s are in no other file, e.g. "
        f"'{min(keys)}'; remove their lines, or add them to the other files"
    )

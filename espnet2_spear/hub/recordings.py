"""Recordings named on a command line: files, tables, data directories."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.audio import AudioError, Span, audio_info
from espnet2_spear.fileio.datadir import DataDirError, entries, read_table
from espnet2_spear.fileio.decode import split_ark
from espnet2_spear.fileio.folders import find_audio
from espnet2_spear.fileio.names import one_word
from espnet2_spear.fileio.utterances import Utterance

WHOLE = Span(None, None)
Failures = dict[str, tuple[str, str]]  # utterance -> reason in a word, message
X, Y = TypeVar("X"), TypeVar("Y")


@dataclass(frozen=True)
class Recording(Utterance):
    """An utterance in any audio file.

    Attributes:
        samples: at 16 kHz, as its header says; resampling may give one more or less.
        span: the part of the file.
        stamp: size in bytes and time of the file, by which another one is noticed.
    """

    span: Span = WHOLE
    stamp: tuple[int, int] = (0, 0)


def find_recordings(
    inputs: Sequence[str],
) -> tuple[list[Recording], Failures]:
    """List the recordings that a command line names.

    Args:
        inputs: audio files, which are called by their names without suffix, see
            :func:`one_word`; ``.scp`` tables (utterance and file); or Kaldi data
            directories, whose ``segments`` are honoured.

    Returns:
        recordings, and those that cannot be read.

    Raises:
        DataDirError: a table that is missing or malformed, or two recordings of one
            name.
    """
    wanted: dict[str, tuple[str, Span]] = {}

    def add(utt: str, path: str, span: Span = WHOLE) -> None:
        if utt in wanted:
            raise DataDirError(
                f"{path}: is called '{utt}', and so is {wanted[utt][0]}; name them in "
                "a wav.scp"
            )
        wanted[utt] = (path, span)

    for name in inputs:
        path = Path(name)
        if path.is_dir():
            for entry in entries(path):
                span = entry.segment.span if entry.segment else WHOLE
                add(entry.utt, find_audio(entry.path, path), span)
        elif path.suffix == ".scp":
            for utt, value in read_table(path, "utterance file").items():
                add(utt, find_audio(value, path.parent))
        else:
            add(one_word(path.stem), name)
    recordings: list[Recording] = []
    skipped: Failures = {}
    for utt, (path, span) in wanted.items():
        try:
            if path.rstrip().endswith("|"):
                raise AudioError(
                    path, "command", "is a command", "write its output to a file first"
                )
            info = audio_info(path)
            stat = os.stat(split_ark(path)[0])
        except (AudioError, OSError) as error:
            skipped[utt] = (getattr(error, "reason", "unreadable"), str(error))
            continue
        end = info.seconds if span.end is None else span.end
        seconds = end - (span.start or 0.0)
        samples = max(0, round(seconds * SAMPLE_RATE))
        stamp = (stat.st_size, stat.st_mtime_ns)
        recordings.append(Recording(utt, path, samples, span, stamp))
    return recordings, skipped


def read_ahead(
    function: Callable[[X], Y], items: Iterable[X], workers: int
) -> Iterator[Y]:
    """``map`` by threads, some items ahead; in order, bounded in memory."""
    queue: deque[Future[Y]] = deque()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for item in items:
            queue.append(pool.submit(function, item))
            if len(queue) > workers:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()

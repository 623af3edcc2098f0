"""Utterances that cannot be read are left out, counted, listed, and limited."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from espnet2_spear.fileio.optional_output import (
    append_lines,
    read_lines,
    warn_on_oserror,
)

MIN_FAILURES = 20  # different utterances, before a share of failures means something


class BadUtterance(Exception):
    """An utterance cannot be used.

    Args:
        utt: its id.
        cause: one word for lists and counts.
        detail: what was found, in which file.
    """

    def __init__(self, utt: str, cause: str, detail: str) -> None:
        super().__init__(utt, cause, detail)
        self.utt, self.cause, self.detail = utt, cause, detail


class TooManyBadUtterances(RuntimeError):
    """More utterances than allowed could not be used."""


class Loaded(NamedTuple):
    """Utterances of a batch, and what could not be read for it."""

    items: list[tuple[str, dict]]
    failures: list[tuple[str, str, str]]
    tried: int


def collate_loaded(
    collate_fn: Callable[[Collection[tuple[str, dict]]], tuple], loaded: Loaded
) -> tuple[list[str], dict, Loaded]:
    """Return ids, tensors, and the failures with the number of rows tried."""
    utts, batch = collate_fn(loaded.items)
    return utts, batch, loaded._replace(items=[])


@dataclass(frozen=True)
class SkipLimits:
    """Options of ``--bad_data_conf``: how much may be bad, of what a process reads.

    What an interrupted run met before does not count: its files may be restored.

    Attributes:
        max_utterances: different bad utterances; null: any number.
        max_share: failures among all that was read, in 0..1; counts from twenty
            different bad utterances on, so that one that is read in every epoch does
            not stop a training.
    """

    max_utterances: int | None = 1000
    max_share: float = 0.01

    def __post_init__(self) -> None:
        if self.max_utterances is not None and self.max_utterances < 0:
            raise ValueError("bad_data_conf.max_utterances is negative")
        if not 0 <= self.max_share <= 1:
            raise ValueError(f"bad_data_conf.max_share {self.max_share}: 0 to 1")


class SkipLog:
    """Counts and lists bad utterances of one process, and stops at the limit.

    Args:
        path: list of them, ``utterance cause detail``; goes on where it ended. It is
            read when it is first needed: not before a training that does not resume has
            removed an earlier one's.
        limits: when to stop.
    """

    def __init__(self, path: Path, limits: SkipLimits) -> None:
        self.path, self.limits = path, limits
        self.failures = self.read = 0
        self._met: set[str] = set()
        self._unwritten: list[str] = []

    @cached_property
    def _known(self) -> dict[str, str]:
        """Cause of each utterance of the list."""
        with warn_on_oserror(self.path):
            lines = [line.split(maxsplit=2) for line in read_lines(self.path)]
            return {words[0]: words[1] for words in lines if len(words) > 1}
        return {}

    @property
    def causes(self) -> Counter[str]:
        """Count the different utterances that failed by each cause."""
        return Counter(self._known.values())

    def __len__(self) -> int:
        return len(self._known)

    def add(self, loaded: Loaded) -> None:
        """Note what could not be read for a batch.

        Raises:
            TooManyBadUtterances: the limit was passed.
        """
        self.read += loaded.tried
        if not loaded.failures:
            return
        self.failures += len(loaded.failures)
        for utt, cause, detail in loaded.failures:
            self._met.add(utt)
            if utt in self._known:
                continue
            self._known[utt] = cause
            # Errors of all ranks show, warnings of the first only.
            logging.warning(f"skipped utterance '{utt}' ({cause}): {detail}")
            self._unwritten.append(f"{utt} {cause} {' '.join(detail.split())}")
        if self._unwritten:
            with warn_on_oserror(self.path):
                append_lines(self.path, self._unwritten)
                self._unwritten = []
        self._check()

    def _check(self) -> None:
        limits, reason, bad = self.limits, None, len(self._met)
        if limits.max_utterances is not None and bad > limits.max_utterances:
            reason = f"more than bad_data_conf.max_utterances={limits.max_utterances}"
        elif bad >= MIN_FAILURES and self.failures > limits.max_share * self.read:
            reason = (
                f"{self.failures} of {self.read} readings failed, more than "
                f"bad_data_conf.max_share={limits.max_share}"
            )
        if reason is not None:
            raise TooManyBadUtterances(
                f"{bad} bad utterances: {reason}. They are listed, with those of "
                f"earlier runs ({self.summary()}), in {self.path}: restore the files, "
                "or prepare the data again, or raise the limit"
            )

    def summary(self) -> str:
        """Counts by cause, the most frequent first."""
        return ", ".join(f"{n} {cause}" for cause, n in self.causes.most_common())

"""Checks of codes on disk against the audio they were made from."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from espnet2_spear.codes.targets import TeacherCodes
from espnet2_spear.constants import MISSING
from espnet2_spear.fileio.ark import ArkError, read_matrix
from espnet2_spear.fileio.datadir import Entry
from espnet2_spear.fileio.tables import Row, join
from espnet2_spear.mvq.report import code_entropy_bits


@dataclass
class CodesCheck:
    """Result of the check of one teacher's codes.

    Attributes:
        teacher: shape that the codes must have.
        problems: (utterance, kind, details) of everything that is wrong.
        without: utterances that should have codes but point to the row of -1: the
            teacher could not read them.
        required: how many should have codes.
        utterances, frames: number of those with sound codes.
        usage: how often each code occurs, int64 (N, K).
    """

    teacher: TeacherCodes
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    without: list[str] = field(default_factory=list)
    required: int = 0
    utterances: int = 0
    frames: int = 0

    def __post_init__(self) -> None:
        shape = (self.teacher.num_codebooks, self.teacher.codebook_size)
        self.usage = np.zeros(shape, np.int64)

    def kinds(self) -> dict[str, int]:
        """Number of problems of every kind."""
        return dict(Counter(kind for _, kind, _ in self.problems))

    def summary(self) -> dict[str, Any]:
        """Figures for a report; entropies and perplexities one a codebook."""
        entropy = []
        if self.frames:
            entropy = code_entropy_bits(torch.from_numpy(self.usage).double()).tolist()
        return {
            "utterances": self.utterances,
            "frames": self.frames,
            "without_codes": len(self.without),
            "problems": self.kinds(),
            "entropy_bits": entropy,
            "perplexity": [2.0**bits for bits in entropy],
            "unused_codes": (self.usage == 0).sum(axis=1).tolist(),
        }


def check_codes(
    utterances: Iterable[Entry],
    specs: Iterable[Row],
    teacher: TeacherCodes,
    domains: Collection[str] | None,
    tolerance: int,
) -> CodesCheck:
    """Read all codes of one teacher.

    Args:
        utterances: with lengths and domains, in the order of names (C locale).
        specs: rows of an scp file, in the same order.
        teacher: shape of the codes.
        domains: whose utterances must have codes, None for all; others may have the
            row of -1.
        tolerance: rows by which codes may be longer or shorter than their audio.
    """
    result = CodesCheck(teacher)
    missing = np.full((1, teacher.num_codebooks), MISSING)
    for count, (utt, (entry, row)) in enumerate(join(utterances, specs), 1):
        if count % 10000 == 0:
            logging.info(f"{count} utterances")
        if entry is None:
            result.problems.append((utt, "unknown", "not in the data directory"))
            continue
        required = domains is None or entry.domain in domains
        result.required += required
        if row is None:
            result.problems.append((utt, "no entry", "no line in the scp file"))
            continue
        try:
            codes = read_matrix(row[1], utt)
        except ArkError as error:
            result.problems.append((utt, "unreadable", str(error)))
            continue
        if np.array_equal(codes, missing):
            if required:
                result.without.append(utt)
            continue
        if problem := teacher.problem(codes, entry.samples, tolerance):
            result.problems.append((utt, *problem))
            continue
        result.utterances += 1
        result.frames += len(codes)
        first = np.arange(teacher.num_codebooks) * teacher.codebook_size
        places = (codes.astype(np.int64) + first).ravel()
        usage = np.bincount(places, minlength=result.usage.size)
        result.usage += usage.reshape(result.usage.shape)
    return result

"""Lists of utterances, of any number, and batches of like lengths of them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.datadir import parse_count
from espnet2_spear.fileio.tables import DataDirError, Lines, join, sorted_rows


@dataclass(frozen=True)
class Utterance:
    """An utterance: its name, 16 kHz file and length in samples."""

    utt: str
    path: str
    samples: int


class UtteranceTable(Sequence[Utterance]):
    """Utterances of a wav.scp, in the order of their names, read when asked for.

    Memory: 12 bytes an utterance.

    Args:
        lines: the wav.scp.
        places: int64 (utterances,), where their lines begin.
        samples: int32 (utterances,), their lengths.
    """

    def __init__(self, lines: Lines, places: np.ndarray, samples: np.ndarray) -> None:
        self._lines, self.places, self.lengths = lines, places, samples

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        line = self._lines.at(int(self.places[number]))
        return Utterance(*line, int(self.lengths[number]))

    def take(self, numbers: np.ndarray) -> UtteranceTable:
        """Return a part, given by ascending numbers in this one."""
        return UtteranceTable(self._lines, self.places[numbers], self.lengths[numbers])


def beside_wav_scp(wav_scp: str | Path, domains: str | None = None) -> UtteranceTable:
    """List utterances by the tables of their data directory.

    Args:
        wav_scp: a path a line; utt2num_samples and utt2domain lie beside it.
        domains: keep only these, separated by commas; None: all.

    Raises:
        DataDirError: a missing or malformed file, a repeated utterance, one without a
            length or a domain, or a domain that none has.
    """
    wav_scp = Path(wav_scp)
    utt2num_samples = wav_scp.with_name("utt2num_samples")
    utt2domain = wav_scp.with_name("utt2domain")
    tables = [
        sorted_rows(wav_scp, "utterance file"),
        sorted_rows(utt2num_samples, "utterance samples"),
        () if domains is None else sorted_rows(utt2domain, "utterance domain"),
    ]
    wanted = set() if domains is None else set(domains.split(","))
    present = set[str]()
    places, samples = array("q"), array("i")
    for utt, (file, count, domain) in join(*tables):
        if file is None:
            continue
        if count is None:
            raise DataDirError(
                f"{utt2num_samples}: has no number of samples for '{utt}' of "
                f"{wav_scp}; run stages 2 and 3 of the recipe again"
            )
        if wanted:
            if domain is None:
                raise DataDirError(
                    f"{utt2domain}: has no domain for '{utt}'; add its line"
                )
            present.add(domain[1])
            if domain[1] not in wanted:
                continue
        places.append(file[2])
        samples.append(parse_count(utt2num_samples, utt, count[1]))
    if absent := wanted - present:
        raise DataDirError(
            f"{utt2domain}: no utterance of domain {', '.join(sorted(absent))}; "
            f"it has: {', '.join(sorted(present))}"
        )
    return UtteranceTable(
        Lines(wav_scp), np.array(places, np.int64), np.array(samples, np.int32)
    )


class Batched:
    """Batches of utterances, made when asked for.

    Memory: 16 bytes an utterance, and 8 a batch.

    Args:
        utterances: of which they are.
        order: places of the utterances of the first batch, of the second, and so on.
        starts: where each batch begins in that order, and the end.

    Attributes:
        lengths: int64 (utterances,), in samples.
    """

    def __init__(
        self, utterances: Sequence[Utterance], order: np.ndarray, starts: Sequence[int]
    ) -> None:
        self._utterances, self._order, self._starts = utterances, order, starts
        self.lengths = lengths_of(utterances)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> list[Utterance]:
        return [self._utterances[place] for place in self.places(number)]

    def places(self, number: int) -> np.ndarray:
        """Places of a batch's utterances among all."""
        return self._order[self._starts[number] : self._starts[number + 1]]


def lengths_of(utterances: Sequence[Utterance]) -> np.ndarray:
    """Lengths in samples, int64 (utterances,)."""
    if isinstance(utterances, UtteranceTable):
        return utterances.lengths.astype(np.int64)
    return np.array([u.samples for u in utterances], np.int64)


def make_batches(utterances: Sequence[Utterance], batch_seconds: float) -> Batched:
    """Group utterances of like lengths, shortest first.

    Args:
        utterances: in any order; the result does not depend on it.
        batch_seconds: bound of a batch's audio, in seconds, padding included; an
            utterance that is longer forms a batch of its own.
    """
    lengths = lengths_of(utterances)
    if isinstance(utterances, UtteranceTable):  # in the order of names
        order = np.argsort(lengths, kind="stable")
    else:
        names = [u.utt for u in utterances]
        places = sorted(range(len(names)), key=lambda i: (lengths[i], names[i]))
        order = np.array(places, np.int64)
    bound = batch_seconds * SAMPLE_RATE
    starts = array("q")
    for at, samples in enumerate(lengths[order]):
        # Sorted: the last utterance of a batch is its longest.
        if not starts or (at - starts[-1] + 1) * samples > bound:
            starts.append(at)
    starts.append(len(lengths))
    return Batched(utterances, order, starts)

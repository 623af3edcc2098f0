"""Utterances by the row of a manifest, as ESPnet's dataset gives them by their id."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
from espnet2.train.dataset import AbsDataset

from espnet2_spear.constants import MISSING, SAMPLE_RATE
from espnet2_spear.data.manifest import Manifest
from espnet2_spear.data.preprocessor import SpearPreprocessor
from espnet2_spear.data.skipping import BadUtterance, Loaded
from espnet2_spear.fileio.ark import ArkError, read_matrix
from espnet2_spear.fileio.audio import AudioError, read_audio

# Samples by which audio may differ from what its list says.
MAX_LENGTH_ERROR = SAMPLE_RATE // 10
SILENCE = "silence-instead-of-a-bad-batch"
TRIES = 4  # rows tried in place of a bad one

Data = dict[str, np.ndarray]


class ManifestDataset(AbsDataset):
    """Reads audio and codes, and prepares them for the model; bad rows are replaced.

    In place of a bad utterance of a batch comes the nearest of its ``substitutes`` that
    can be read and is not in the batch, if one of the first four can. A batch of which
    nothing can be read becomes one silent utterance without targets, so that the other
    ranks need not wait.

    Args:
        manifest: with the lists ``speech`` and ``codes_<teacher>`` of Kaldi arks.
        preprocess: turns id and data into arrays for the model.
        dtype: of audio.
        substitute: False leaves bad utterances out only (validation).
    """

    def __init__(
        self,
        manifest: Manifest,
        preprocess: SpearPreprocessor,
        dtype: str = "float32",
        substitute: bool = True,
    ) -> None:
        self.manifest, self.preprocess = manifest, preprocess
        self.dtype, self.substitute = dtype, substitute

    def __len__(self) -> int:
        return len(self.manifest)

    def names(self) -> tuple[str, ...]:
        """Names of the data."""
        return (*self.manifest.files, "domain")

    def has_name(self, name: str) -> bool:
        """Whether there are data of that name."""
        return name in self.names()

    def __repr__(self) -> str:
        lists = {name: facts["path"] for name, facts in self.manifest.files.items()}
        content = "".join(f"\n  {name}: {path}" for name, path in lists.items())
        return f"{len(self)} utterances in {self.manifest.folder}{content}"

    def __getitem__(self, row: int) -> tuple[str, Data]:
        """Read one utterance.

        Returns:
            id and ``speech`` (samples,), ``domain`` and ``codes_<teacher>`` (T, N), the
            latter two as ``preprocess`` makes them.

        Raises:
            BadUtterance: something of it cannot be used.
        """
        utt, values = self.manifest.entry(row)
        data: dict = {"domain": self.manifest.group(row).domain}
        try:
            listed = int(self.manifest.samples[row])
            data["speech"] = self._speech(utt, values.pop("speech"), listed)
            for name, spec in values.items():
                data[name] = read_matrix(spec, utt)
        except AudioError as error:
            raise BadUtterance(utt, f"audio_{error.reason}", str(error)) from error
        except ArkError as error:
            raise BadUtterance(utt, "codes_unreadable", str(error)) from error
        try:
            return utt, self.preprocess(utt, data)
        except ValueError as error:
            raise BadUtterance(utt, "content", str(error)) from error

    def _speech(self, utt: str, path: str, listed: int) -> np.ndarray:
        speech, rate = read_audio(path)
        if rate != SAMPLE_RATE:
            raise BadUtterance(
                utt, "audio_rate", f"{path}: {rate} Hz instead of {SAMPLE_RATE}"
            )
        if abs(len(speech) - listed) > MAX_LENGTH_ERROR:
            raise BadUtterance(
                utt,
                "audio_length",
                f"{path}: {len(speech)} samples, where its list says {listed}",
            )
        # Not a sample more than the batch was planned with.
        return speech[:listed].astype(self.dtype, copy=False)

    def __getitems__(self, rows: Sequence[int]) -> Loaded:
        """Read a batch; torch's DataLoader calls it with the rows of one."""
        rows = [int(row) for row in rows]
        taken, failures = set(rows), []
        items: list[tuple[str, Data]] = []
        for row in rows:
            others = (r for r in self.substitutes(row) if r not in taken)
            for other in (row, *islice(others, TRIES if self.substitute else 0)):
                taken.add(other)
                try:
                    items.append(self[other])
                    break
                except BadUtterance as bad:
                    failures.append((bad.utt, bad.cause, bad.detail))
        tried = len(items) + len(failures)
        return Loaded(items or [self.silence()], failures, tried)

    def substitutes(self, row: int) -> range:
        """Rows to take instead, the likest first: as long or shorter, same group."""
        return range(row - 1, self.manifest.group(row).first - 1, -1)

    def silence(self) -> tuple[str, Data]:
        """A second of silence without any codes: its loss and gradient are zero."""
        data: dict = {"domain": self.manifest.groups[0].domain}
        data["speech"] = np.zeros(SAMPLE_RATE, self.dtype)
        for name, teacher in self.preprocess.teachers.items():
            codes = np.full((1, teacher.num_codebooks), MISSING, np.float32)
            data[f"codes_{name}"] = codes
        return SILENCE, self.preprocess(SILENCE, data)

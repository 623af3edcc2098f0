"""Utterances by the row of a manifest, as ESPnet's dataset gives them by their id."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from espnet2.train.dataset import AbsDataset

from espnet2_spear.codes.store import CodeStore, CodeStoreError
from espnet2_spear.constants import MISSING, SAMPLE_RATE
from espnet2_spear.data.manifest import Manifest
from espnet2_spear.data.skipping import BadUtterance
from espnet2_spear.fileio.ark import ArkError, read_matrix
from espnet2_spear.fileio.audio import AudioError, read_audio

# Samples by which audio may differ from what its list says.
MAX_LENGTH_ERROR = SAMPLE_RATE // 10
SILENCE = "silence-instead-of-a-bad-batch"

Data = dict[str, np.ndarray]


class ManifestDataset(AbsDataset):
    """Reads audio and codes, and prepares them for the model.

    Args:
        manifest: with the lists ``speech`` and ``codes_<teacher>`` of Kaldi arks.
        stores: ``codes_<teacher>`` -> memory-mapped codes of further teachers.
        preprocess: turns id and data into arrays for the model.
        dtype: of audio.
    """

    def __init__(
        self,
        manifest: Manifest,
        stores: Mapping[str, CodeStore],
        preprocess: Callable[[str, dict], Data] | None,
        dtype: str = "float32",
    ) -> None:
        self.manifest, self.stores = manifest, dict(stores)
        self.preprocess, self.dtype = preprocess, dtype

    def __len__(self) -> int:
        return len(self.manifest)

    def names(self) -> tuple[str, ...]:
        """Names of the data."""
        return (*self.manifest.files, "domain", *self.stores)

    def has_name(self, name: str) -> bool:
        """Whether there are data of that name."""
        return name in self.names()

    def __repr__(self) -> str:
        lists = {name: facts["path"] for name, facts in self.manifest.files.items()}
        lists |= {name: str(store.folder) for name, store in self.stores.items()}
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
            for name, store in self.stores.items():
                data[name] = store[utt]
        except AudioError as error:
            raise BadUtterance(utt, f"audio_{error.reason}", str(error)) from error
        except (ArkError, CodeStoreError) as error:
            raise BadUtterance(utt, "codes_unreadable", str(error)) from error
        except KeyError as error:
            detail = f"{error} is not in the store of codes"
            raise BadUtterance(utt, "codes_missing", detail) from error
        return utt, self._prepare(utt, data)

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

    def _prepare(self, utt: str, data: dict) -> Data:
        if self.preprocess is None:
            return data
        try:
            return self.preprocess(utt, data)
        except ValueError as error:
            raise BadUtterance(utt, "content", str(error)) from error

    def substitutes(self, row: int) -> range:
        """Rows to take instead, the likest first: as long or shorter, same group."""
        return range(row - 1, self.manifest.group(row).first - 1, -1)

    def silence(self, num_codebooks: Mapping[str, int]) -> tuple[str, Data]:
        """A second of silence without any codes: its loss and gradient are zero.

        Args:
            num_codebooks: ``codes_<teacher>`` -> N.
        """
        data: dict = {"domain": self.manifest.groups[0].domain}
        data["speech"] = np.zeros(SAMPLE_RATE, self.dtype)
        for name, width in num_codebooks.items():
            data[name] = np.full((1, width), MISSING, np.float32)
        return SILENCE, self._prepare(SILENCE, data)

"""Utterances by the row of a manifest, as ESPnet's dataset gives them by their id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np
from torch.utils.data import Dataset

from espnet2_spear.codes.targets import TeacherCodes
from espnet2_spear.constants import MISSING, SAMPLE_RATE
from espnet2_spear.data.manifest import Manifest
from espnet2_spear.data.skipping import BadUtterance, Loaded
from espnet2_spear.fileio.ark import ArkError, read_matrix
from espnet2_spear.fileio.audio import AudioError, read_audio
from espnet2_spear.spear.student import MIN_SAMPLES

# Samples by which audio may differ from what its list says.
MAX_LENGTH_ERROR = SAMPLE_RATE // 10
SILENCE = "silence-instead-of-a-bad-batch"
TRIES = 4  # rows tried in place of a bad one

Data = dict[str, np.ndarray]


class SpearPreprocessor:
    """Turns what ESPnet's dataset loaded into arrays for the model.

    Args:
        teachers: teacher name -> shape of its codes.
        domains: domain names, in the model's order.
    """

    def __init__(
        self, teachers: Mapping[str, TeacherCodes], domains: Sequence[str]
    ) -> None:
        self.teachers = dict(teachers)
        self.domains = list(domains)

    def __call__(
        self, uid: str, data: dict[str, str | np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Convert one utterance.

        ``speech`` stays float (samples,), ``domain`` becomes its index (1,) and
        ``codes_<teacher>`` int16 (T, N). A single row of -1 says that the utterance
        has no codes of that teacher.

        Raises:
            ValueError: audio that is not mono or is too short, an unknown domain, or
                codes of the wrong width, range or length or that are no whole numbers;
                the message names the utterance and the remedy.
        """
        speech = data["speech"]
        if speech.ndim != 1 or speech.size < MIN_SAMPLES:
            raise ValueError(
                f"utterance '{uid}': audio of shape {speech.shape}; mono with at least "
                f"{MIN_SAMPLES} samples is needed (run the recipe's stages 2 and 3)"
            )
        data["domain"] = np.array([self._domain(uid, str(data["domain"]).strip())])
        for name, teacher in self.teachers.items():
            codes = data[f"codes_{name}"]
            absent = np.full((1, teacher.num_codebooks), MISSING)
            problem = teacher.problem(codes, speech.size)
            if problem and not np.array_equal(codes, absent):
                raise ValueError(
                    f"utterance '{uid}': codes of teacher '{name}': "
                    f"{': '.join(problem)}; check them with spear_check_codes and "
                    "tokenize again (stage 5)"
                )
            data[f"codes_{name}"] = codes.astype(np.int16)
        return data

    def _domain(self, uid: str, domain: str) -> int:
        if domain not in self.domains:
            raise ValueError(
                f"utterance '{uid}': domain '{domain}' is not one of {self.domains}; "
                "correct utt2domain or the option --domains"
            )
        return self.domains.index(domain)


class ManifestDataset(Dataset):
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
        except OSError as error:  # such as of a server that does not answer
            raise BadUtterance(utt, "unreadable", str(error)) from error
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

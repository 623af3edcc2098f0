"""Checks and conversions of one utterance of pre-training data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from espnet2_spear.codes.targets import TeacherCodes
from espnet2_spear.constants import MISSING


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
            ValueError: audio that is not mono or is empty, an unknown domain, or
                codes of the wrong width, range or length or that are no whole numbers;
                the message names the utterance and the remedy.
        """
        speech = data["speech"]
        if speech.ndim != 1 or speech.size == 0:
            raise ValueError(
                f"utterance '{uid}': audio of shape {speech.shape}; mono with at least "
                "one sample is needed (run the recipe's stages 2 and 3)"
            )
        data["domain"] = np.array([self._domain(uid, str(data["domain"]).strip())])
        for name, teacher in self.teachers.items():
            key = f"codes_{name}"
            data[key] = self._codes(uid, name, teacher, data[key], speech.size)
        return data

    def _domain(self, uid: str, domain: str) -> int:
        if domain not in self.domains:
            raise ValueError(
                f"utterance '{uid}': domain '{domain}' is none of {self.domains}; "
                "correct utt2domain or the option --domains"
            )
        return self.domains.index(domain)

    def _codes(
        self, uid: str, name: str, teacher: TeacherCodes, codes: np.ndarray, samples
    ) -> np.ndarray:
        absent = np.full((1, teacher.num_codebooks), MISSING)
        problem = teacher.problem(codes, samples)
        if problem and not np.array_equal(codes, absent):
            raise ValueError(
                f"utterance '{uid}': codes of teacher '{name}': {': '.join(problem)}; "
                "check them with spear_check_codes and tokenize again (stage 5)"
            )
        return codes.astype(np.int16)

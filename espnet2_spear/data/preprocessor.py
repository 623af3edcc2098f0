"""Checks and conversions of one utterance of pre-training data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from espnet2_spear.codes.targets import TeacherCodes
from espnet2_spear.constants import MISSING, SAMPLE_RATE

# Rows by which codes may fall short of their audio: a teacher's receptive field.
MAX_MISSING_ROWS = 5


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
        remedy = "check them with spear_check_codes and tokenize again (stage 5)"
        if codes.ndim != 2 or codes.shape[1] != teacher.num_codebooks:
            raise ValueError(
                f"utterance '{uid}': codes of teacher '{name}' have shape "
                f"{codes.shape}, expected (frames, {teacher.num_codebooks}); {remedy}"
            )
        if len(codes) == 0 or (codes != np.trunc(codes)).any():
            what = "are no whole numbers" if len(codes) else "have no frames"
            raise ValueError(
                f"utterance '{uid}': codes of teacher '{name}' {what}; {remedy}"
            )
        if codes.min() < MISSING or codes.max() >= teacher.codebook_size:
            raise ValueError(
                f"utterance '{uid}': codes of teacher '{name}' are in "
                f"{codes.min()}..{codes.max()}, expected 0.."
                f"{teacher.codebook_size - 1}; {remedy}"
            )
        absent = len(codes) == 1 and (codes == MISSING).all()
        expected = samples * teacher.frame_rate / SAMPLE_RATE
        if not absent and abs(expected - len(codes)) > MAX_MISSING_ROWS:
            raise ValueError(
                f"utterance '{uid}': {len(codes)} code frames of teacher '{name}' for "
                f"{samples} samples, about {expected:.0f} expected; {remedy}"
            )
        return codes.astype(np.int16)

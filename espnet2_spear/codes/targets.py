"""Teacher codes as targets at the student's frame rate, [3.7] of docs/method.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from espnet2_spear.constants import MAX_CODEBOOK_SIZE, MISSING, SAMPLE_RATE

# Rows by which codes and audio may differ in length: a teacher's receptive field.
MAX_MISSING_ROWS = 5


@dataclass(frozen=True)
class TeacherCodes:
    """Shape of a teacher's codes, and the place where the student predicts them.

    Attributes:
        num_codebooks: codes per teacher frame.
        codebook_size: number of different codes; up to 256 take a byte, more (such as
            the 2000 of k-means) take two bytes in memory and four in an ark.
        frame_rate: teacher frames per second.
        quantizer: identity of the quantizer that made them, if it is known.
        layer: layer of the student that predicts them, counted from 1, at 50 Hz;
            None is the student's output, whatever its rate.
    """

    num_codebooks: int
    codebook_size: int = 256
    frame_rate: float = 50.0
    quantizer: str | None = None
    layer: int | None = None

    @classmethod
    def from_dict(cls, name: str, conf: Mapping[str, Any]) -> TeacherCodes:
        """Build from YAML.

        Raises:
            ValueError: missing or unknown keys, or a codebook that two bytes cannot
                number; the message names the teacher.
        """
        try:
            codes = cls(**conf)
            fits = 2 <= codes.codebook_size <= MAX_CODEBOOK_SIZE
        except TypeError as error:
            raise ValueError(f"teacher '{name}': {error}") from None
        if not fits:
            raise ValueError(
                f"teacher '{name}': codebook_size is {codes.codebook_size}; from 2 to "
                f"{MAX_CODEBOOK_SIZE}"
            )
        return codes

    def per_student_frame(self, student_rate: float) -> int:
        """Teacher frames that one student frame predicts; 1 if it is the faster.

        Raises:
            ValueError: neither rate is a whole multiple of the other.
        """
        ratio = self.frame_rate / student_rate
        for value in (ratio, 1 / ratio):
            if value >= 1 and abs(value - round(value)) < 1e-6:
                return max(1, round(ratio))
        raise ValueError(
            f"teacher at {self.frame_rate} Hz and student at {student_rate} Hz: one "
            "rate must be a whole multiple of the other"
        )

    def problem(
        self, codes: np.ndarray, samples: int, tolerance: int = MAX_MISSING_ROWS
    ) -> tuple[str, str] | None:
        """Look what is wrong with the codes of an utterance; None if nothing is.

        Args:
            codes: of any type and shape; expected are whole numbers (frames, N).
            samples: of the utterance's audio.
            tolerance: rows by which there may be more or less of them.

        Returns:
            what is wrong in two words, and in detail.
        """
        width, last = self.num_codebooks, self.codebook_size - 1
        if codes.ndim != 2 or codes.shape[1] != width:
            return "wrong width", f"shape {codes.shape} instead of (frames, {width})"
        low, high = codes.min(initial=0), codes.max(initial=0)
        if low < 0 or high > last or (codes != np.rint(codes)).any():
            return "wrong values", f"codes in {low:g}..{high:g}, not whole in 0..{last}"
        expected = samples * self.frame_rate / SAMPLE_RATE
        if not len(codes) or abs(len(codes) - expected) > tolerance:
            found = f"{len(codes)} frames for {samples} samples"
            return "wrong length", f"{found}, expected {expected:.1f}"
        return None


def teacher_codes(teachers: Mapping[str, Mapping[str, Any]]) -> dict[str, TeacherCodes]:
    """Build those of the option ``--teachers``; see :meth:`TeacherCodes.from_dict`."""
    return {str(k): TeacherCodes.from_dict(str(k), v) for k, v in teachers.items()}


def match_frame_rate(
    codes: Tensor,
    teacher_rate: float,
    student_rate: float,
    frames: int,
    delay: int = 0,
) -> Tensor:
    """Bring codes to the student's rate, left aligned, without any shift but ``delay``.

    A faster teacher's frames are stacked (frame-major, then codebook); a slower
    teacher's are repeated. Trailing codes are cut, missing ones are ignored.

    Args:
        codes: (B, T, N) int, ``MISSING`` in the padding.
        teacher_rate: frames per second of the codes.
        student_rate: frames per second of the student's output.
        frames: student frames T'.
        delay: student frame t gets the codes of frame t - delay.

    Returns:
        (B, T', N r) with r = teacher_rate / student_rate, at least 1.
    """
    if teacher_rate < student_rate:
        codes = codes.repeat_interleave(round(student_rate / teacher_rate), dim=1)
    stack = max(1, round(teacher_rate / student_rate))
    front = min(delay, frames) * stack
    codes = codes[:, : frames * stack - front]
    behind = frames * stack - front - codes.size(1)
    codes = F.pad(codes, (0, 0, front, behind), value=MISSING)
    return codes.reshape(codes.size(0), frames, stack * codes.size(2))

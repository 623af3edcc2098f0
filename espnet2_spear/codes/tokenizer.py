"""Audio to codes: a teacher and its quantizer, batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espnet2_spear.fileio.utterances import Utterance
from espnet2_spear.mvq.files import load_quantizer
from espnet2_spear.mvq.quantizer import AbsQuantizer, QuantizerError
from espnet2_spear.teachers import build_teacher
from espnet2_spear.teachers.base import Teacher, TeacherError, difference
from espnet2_spear.teachers.extract import Audio, embed_audio, read_batch


@dataclass(frozen=True)
class TokenizeOptions:
    """How one teacher's codes are made.

    Attributes:
        name: of the teacher's role (``speech``, ``audio``): first part of file names.
        teacher: name of the teacher, as for ``build_teacher``.
        teacher_conf: its options.
        quantizer: file of the quantizer.
        refine_iters: passes of the quantizer's joint search; its own number for None.
        extra_passes: passes after these, which never make the error larger.
        dtype: of the teacher's computation: ``float32``, or ``bfloat16`` or
            ``float16`` for autocast. Quantizers always work in float32.
        max_frames: frames quantized at once, which bounds the memory of the search
            and does not change it; the quantizer's own number for None.
    """

    name: str
    teacher: str
    teacher_conf: dict[str, Any]
    quantizer: str
    refine_iters: int | None = None
    extra_passes: int = 0
    dtype: str = "float32"
    max_frames: int | None = None


def check_match(teacher: Teacher, quantizer: AbsQuantizer, path: str | Path) -> None:
    """Raise TeacherError if the quantizer was not trained on this teacher."""
    remedy = "train one on this teacher's embeddings (stage 4 of the recipe)"
    if quantizer.dim != teacher.dim:
        raise TeacherError(
            f"{path}: is a quantizer of {quantizer.dim} dimensions, teacher "
            f"{teacher.name} gives {teacher.dim}; {remedy}"
        )
    if quantizer.codebook_size > 256:
        raise TeacherError(
            f"{path}: has {quantizer.codebook_size} entries in a codebook; codes are "
            "stored in a byte, so at most 256 can be used"
        )
    trained_on = quantizer.metadata.get("teacher")
    if not trained_on:
        logging.warning(f"{path}: does not say on which teacher it was trained")
    elif differs := difference(trained_on, teacher.describe()):
        raise TeacherError(
            f"{path}: was trained on another teacher ({differs}); {remedy}"
        )


class Tokenizer:
    """A teacher and its quantizer on a device.

    Raises:
        TeacherError: they do not match.
        QuantizerError: no quantizer, or options that it does not have.
    """

    def __init__(self, options: TokenizeOptions, device: str = "cpu") -> None:
        self.options = options
        teacher = build_teacher(options.teacher, options.teacher_conf)
        quantizer = load_quantizer(options.quantizer)
        check_match(teacher, quantizer, options.quantizer)
        try:
            quantizer.passes(options.refine_iters)
            quantizer.check_extra_passes(options.extra_passes)
            quantizer.check_max_frames(options.max_frames)
        except QuantizerError as error:
            raise QuantizerError(f"{options.quantizer}: {error}") from None
        self.teacher, self.quantizer = teacher, quantizer.eval()
        self.to(device)

    def to(self, device: str) -> None:
        """Move the teacher and its quantizer to a device."""
        self.teacher.to(device)
        self.quantizer.to(device)

    def encode(
        self, audio: Audio, failed: list[tuple[str, str]]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (utterance, codes (T, N) uint8); append the others to ``failed``."""
        result = embed_audio(self.teacher, audio, self.options.dtype)
        failed += result.failed
        if not result.utts:
            return
        codes = self._quantize(result.frames).to(torch.uint8).cpu()
        parts = codes.split([len(x) for x in result.frames])
        for utterance, part in zip(result.utts, parts, strict=True):
            yield utterance.utt, part.numpy()

    def agreement(self, batch: Sequence[Utterance]) -> float:
        """Share of float32's codes of some utterances that lower precision gives, too.

        Those of utterances that it has no codes of count as others.

        Returns:
            0 to 1; nan if float32 has codes of none.
        """
        audio = read_batch(batch)
        expected = embed_audio(self.teacher, audio, "float32")
        lower = embed_audio(self.teacher, audio, self.options.dtype)
        frames = dict(zip((u.utt for u in lower.utts), lower.frames, strict=True))
        same = count = 0
        for utterance, exact in zip(expected.utts, expected.frames, strict=True):
            codes = self._quantize([exact])
            count += codes.numel()
            if utterance.utt in frames:
                found = self._quantize([frames[utterance.utt]])
                same += int((found == codes).sum())
        return same / count if count else float("nan")

    def _quantize(self, frames: Sequence[Tensor]) -> Tensor:
        with torch.inference_mode():
            return self.quantizer.encode(
                torch.cat(tuple(frames)),
                refine_iters=self.options.refine_iters,
                max_frames=self.options.max_frames,
                extra_passes=self.options.extra_passes,
            )

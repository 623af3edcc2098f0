"""Audio to codes: a teacher and its quantizer, batch by batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espnet2_spear.constants import MAX_CODEBOOK_SIZE
from espnet2_spear.fileio.utterances import Utterance
from espnet2_spear.mvq.files import load_quantizer
from espnet2_spear.mvq.quantizer import AbsQuantizer, QuantizerError
from espnet2_spear.teachers import build_teacher
from espnet2_spear.teachers.base import Teacher, TeacherError, difference
from espnet2_spear.teachers.embed import Batch, embed_audio, read_batch

AGREEMENT_UTTERANCES = 16  # compared with float32 before a run in lower precision
LOW_AGREEMENT = 0.8  # share of float32's codes below which there is a warning


@dataclass(frozen=True)
class TokenizeOptions:
    """Options of the tokenization by one teacher.

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
    if quantizer.codebook_size > MAX_CODEBOOK_SIZE:
        raise TeacherError(
            f"{path}: has {quantizer.codebook_size} entries in a codebook; codes are "
            f"int16 in memory: at most {MAX_CODEBOOK_SIZE} entries"
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
            quantizer.passes(
                options.refine_iters, options.extra_passes, options.max_frames
            )
        except QuantizerError as error:
            raise QuantizerError(f"{options.quantizer}: {error}") from None
        self.teacher, self.quantizer = teacher, quantizer.eval()
        self.to(device)

    def to(self, device: str) -> None:
        """Move the teacher and its quantizer to a device."""
        self.teacher.to(device)
        self.quantizer.to(device)

    def describe(self) -> dict[str, Any]:
        """Facts about the codes for ``<name>.json``, in primitives."""
        options, quantizer = self.options, self.quantizer
        return {
            "teacher": self.teacher.describe(),
            "quantizer": options.quantizer,
            "quantizer_id": quantizer.identity,
            "quantizer_kind": quantizer.kind,
            "passes": quantizer.passes(options.refine_iters),
            "extra_passes": options.extra_passes,
            "frame_rate": self.teacher.frame_rate,
            "num_codebooks": quantizer.num_codebooks,
            "codebook_size": quantizer.codebook_size,
            "dtype": options.dtype,
        }

    def encode(
        self, audio: Batch
    ) -> tuple[dict[str, np.ndarray], list[tuple[str, str]]]:
        """Codes of a batch.

        Returns:
            utterance -> codes (T, N), uint8 or, of codebooks of more than 256 entries,
            int16; and the other utterances, each with the reason.
        """
        result = embed_audio(self.teacher, audio, self.options.dtype)
        if not result.utts:
            return {}, result.failed
        codes = self._quantize(result.tensors)
        # Codes of thousands of hours are kept: a byte each where it suffices.
        one_byte = self.quantizer.codebook_size <= 256
        codes = codes.to(torch.uint8 if one_byte else torch.int16).cpu()
        parts = codes.split([len(x) for x in result.tensors])
        names = (utterance.utt for utterance in result.utts)
        encoded = {utt: part.numpy() for utt, part in zip(names, parts, strict=True)}
        return encoded, result.failed

    def agreement(self, batch: Sequence[Utterance]) -> float:
        """Share of float32's codes of some utterances that lower precision gives, too.

        Codes of utterances for which it gives none count as different.

        Returns:
            0 to 1; nan if float32 gives no codes at all.
        """
        audio = read_batch(batch)
        expected = embed_audio(self.teacher, audio, "float32")
        lower = embed_audio(self.teacher, audio, self.options.dtype)
        frames = dict(zip((u.utt for u in lower.utts), lower.tensors, strict=True))
        same = count = 0
        for utterance, exact in zip(expected.utts, expected.tensors, strict=True):
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


def teacher_tokens(
    teacher: Teacher, quantizer: AbsQuantizer
) -> Callable[[Tensor, Sequence[Tensor], Tensor], Tensor]:
    """The codes of a teacher's embeddings, as a source of tokens for an inspection.

    Args:
        teacher: on the student's device.
        quantizer: there, too.

    Returns:
        function of speech (1, samples), and of layers and output of a student, which a
        teacher does not need: codes (T, N).
    """

    def tokens(speech: Tensor, layers: Sequence[Tensor], out: Tensor) -> Tensor:
        lengths = torch.tensor([speech.size(1)], device=speech.device)
        frames, counts = teacher(speech, lengths)
        return quantizer.encode(frames[0, : int(counts[0])])

    return tokens


def check_agreement(
    tokenizer: Tokenizer,
    utterances: Sequence[Utterance],
    device: str,
    min_agreement: float,
) -> float | None:
    """Compare codes of lower precision with those of float32, and log it.

    It is done on the device of the workers, whose lower precision may be another than
    that of the CPU; the tokenizer is left on the CPU.

    Args:
        tokenizer: whose options say the precision.
        utterances: some of them, spread evenly, are compared.
        device: to compute on.
        min_agreement: share of float32's codes that there must be, 0 to 1.

    Returns:
        the share; nan if there was nothing to compare, None for float32 itself.

    Raises:
        TeacherError: a smaller share.
    """
    options = tokenizer.options
    if options.dtype == "float32":
        return None
    step = max(1, len(utterances) // AGREEMENT_UTTERANCES)
    some = utterances[::step][:AGREEMENT_UTTERANCES]
    tokenizer.to(device)
    share = tokenizer.agreement(some)
    tokenizer.to("cpu")  # the memory is that of the workers
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    if math.isnan(share):
        logging.warning(
            f"{options.name}: the codes in {options.dtype} were NOT compared with "
            f"those of float32: the teacher has no output for any of {len(some)} "
            f"utterances; the reasons will be in {options.name}.failed"
        )
        return share
    measured = (
        f"{options.name}: {100 * share:.1f} % of the codes of {len(some)} utterances "
        f"in {options.dtype} on {device} are those of float32"
    )
    if share < min_agreement:
        raise TeacherError(
            f"{measured}, less than the {100 * min_agreement:g} % of "
            "--min_agreement: nothing was tokenized; compute in float32, or "
            "accept it by a smaller --min_agreement"
        )
    if share < LOW_AGREEMENT:
        logging.warning(f"{measured}: FEW; the students learn other targets")
    else:
        logging.info(measured)
    return share

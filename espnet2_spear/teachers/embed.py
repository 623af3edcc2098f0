"""A teacher over batches of audio files: embeddings, and a list of what failed."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.audio import AudioError, read_audio
from espnet2_spear.fileio.utterances import Utterance
from espnet2_spear.teachers.base import Teacher, TeacherError


@dataclass(frozen=True)
class Batch:
    """Some utterances, with their audio or with their embeddings.

    Attributes:
        utts: the utterances that went well so far.
        tensors: for each, its audio (samples,) float32 in [-1, 1] at 16 kHz, or its
            embeddings (T, dim) float32, on the teacher's device.
        failed: the names of the others, with the reason.
    """

    utts: list[Utterance]
    tensors: list[Tensor]
    failed: list[tuple[str, str]]

    def select(self, names: Container[str]) -> Batch:
        """The part of the batch with these utterances."""
        pairs = zip(self.utts, self.tensors, strict=True)
        kept = {u: tensor for u, tensor in pairs if u.utt in names}
        failed = [failure for failure in self.failed if failure[0] in names]
        return Batch(list(kept), list(kept.values()), failed)

    def without(self, reasons: Sequence[str]) -> Batch:
        """Move each utterance that has a reason to those that failed."""
        rows = list(zip(self.utts, self.tensors, reasons, strict=True))
        return Batch(
            [u for u, _, reason in rows if not reason],
            [tensor for _, tensor, reason in rows if not reason],
            self.failed + [(u.utt, reason) for u, _, reason in rows if reason],
        )


def _read(utterance: Utterance) -> np.ndarray:
    """Read the audio of one utterance, raising AudioError."""
    speech, rate = read_audio(utterance.path)
    remedy = "run stages 2 and 3 of the recipe again"
    if rate != SAMPLE_RATE:
        detail = f"is sampled at {rate} Hz, not at the {SAMPLE_RATE} Hz of teachers"
        raise AudioError(utterance.path, "bad_rate", detail, remedy)
    if len(speech) != utterance.samples:
        detail = f"has {len(speech)} samples, {utterance.samples} in utt2num_samples"
        raise AudioError(utterance.path, "wrong_length", detail, remedy)
    return speech


def read_batch(utterances: Sequence[Utterance]) -> Batch:
    """Read the audio of a batch; what cannot be read is listed."""
    audio = Batch([], [], [])
    for utterance in utterances:
        try:
            audio.tensors.append(torch.from_numpy(_read(utterance)))
            audio.utts.append(utterance)
        except (AudioError, OSError) as error:
            audio.failed.append((utterance.utt, " ".join(str(error).split())))
    return audio


def embed_audio(teacher: Teacher, audio: Batch, dtype: str = "float32") -> Batch:
    """Embed a batch; what the teacher cannot take is listed with what was unreadable.

    Args:
        teacher: on the device to compute on.
        audio: the batch.
        dtype: ``float32``, or ``bfloat16`` or ``float16`` for autocast to it.
    """
    audio = audio.without([_refusal(teacher, len(x)) for x in audio.tensors])
    if not audio.utts:
        return audio
    device = next(teacher.parameters()).device
    lengths = torch.tensor([len(x) for x in audio.tensors], device=device)
    speech = torch.nn.utils.rnn.pad_sequence(audio.tensors, batch_first=True).to(device)
    lower = torch.autocast(
        device.type, getattr(torch, dtype), enabled=dtype != "float32"
    )
    with torch.inference_mode(), lower:
        padded, frame_lengths = teacher(speech, lengths)
    padded = padded.float()
    frames = [x[:n] for x, n in zip(padded, frame_lengths.tolist(), strict=True)]
    result = Batch(audio.utts, frames, audio.failed)
    # One reduction for the batch; utterances are looked at only if it finds something.
    if bool(torch.isfinite(padded).all()):
        return result
    return result.without(
        [
            ""
            if x.isfinite().all()
            else f"{u.path}: the teacher's output is not finite"
            for u, x in zip(audio.utts, frames, strict=True)
        ]
    )


def _refusal(teacher: Teacher, samples: int) -> str:
    """Why a teacher cannot embed audio of so many samples; empty if it can."""
    try:
        teacher.check_length(samples)
    except TeacherError as error:
        return " ".join(str(error).split())
    return ""


def embed_batch(
    teacher: Teacher, utterances: Sequence[Utterance], dtype: str = "float32"
) -> Batch:
    """Read and embed one batch; what cannot be read or embedded is listed."""
    return embed_audio(teacher, read_batch(utterances), dtype)

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
class Embedded:
    """Embeddings of a batch.

    Attributes:
        utts: the utterances that could be embedded.
        frames: for each, its embeddings (T, dim) float32, on the teacher's device.
        failed: the others, with the reason.
    """

    utts: list[Utterance]
    frames: list[Tensor]
    failed: list[tuple[str, str]]


@dataclass(frozen=True)
class Audio:
    """A batch of audio as read from files.

    Attributes:
        utts: the utterances that could be read.
        samples: for each, (samples,) float32 in [-1, 1] at 16 kHz.
        failed: the others, with the reason.
    """

    utts: list[Utterance]
    samples: list[Tensor]
    failed: list[tuple[str, str]]

    def select(self, names: Container[str]) -> Audio:
        """The part of the batch with these utterances."""
        kept = [i for i, u in enumerate(self.utts) if u.utt in names]
        return Audio(
            [self.utts[i] for i in kept],
            [self.samples[i] for i in kept],
            [failure for failure in self.failed if failure[0] in names],
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


def read_batch(batch: Sequence[Utterance]) -> Audio:
    """Read the audio of a batch; what cannot be read is listed."""
    audio = Audio([], [], [])
    for utterance in batch:
        try:
            audio.samples.append(torch.from_numpy(_read(utterance)))
            audio.utts.append(utterance)
        except (AudioError, OSError) as error:
            audio.failed.append((utterance.utt, " ".join(str(error).split())))
    return audio


def embed_audio(teacher: Teacher, audio: Audio, dtype: str = "float32") -> Embedded:
    """Embed a batch; what the teacher cannot take is listed with what was unreadable.

    Args:
        teacher: on the device to compute on.
        audio: the batch.
        dtype: ``float32``, or ``bfloat16`` or ``float16`` for autocast to it.
    """
    failed = list(audio.failed)
    utts, samples = [], []
    for utterance, speech in zip(audio.utts, audio.samples, strict=True):
        try:
            teacher.check_length(len(speech))
        except TeacherError as error:
            failed.append((utterance.utt, " ".join(str(error).split())))
        else:
            utts.append(utterance)
            samples.append(speech)
    if not utts:
        return Embedded([], [], failed)
    device = next(teacher.parameters()).device
    lengths = torch.tensor([len(x) for x in samples], device=device)
    speech = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True).to(device)
    lower = torch.autocast(
        device.type, getattr(torch, dtype), enabled=dtype != "float32"
    )
    with torch.inference_mode(), lower:
        padded, frame_lengths = teacher(speech, lengths)
    padded = padded.float()
    frames = [x[:n] for x, n in zip(padded, frame_lengths.tolist(), strict=True)]
    # One reduction for the batch; utterances are looked at only if it finds something.
    if not bool(torch.isfinite(padded).all()):
        good = [bool(torch.isfinite(x).all()) for x in frames]
        failed += [
            (u.utt, f"{u.path}: the teacher's output is not finite")
            for u, ok in zip(utts, good, strict=True)
            if not ok
        ]
        frames = [x for x, ok in zip(frames, good, strict=True) if ok]
        utts = [u for u, ok in zip(utts, good, strict=True) if ok]
    return Embedded(utts, frames, failed)


def embed_batch(
    teacher: Teacher, batch: Sequence[Utterance], dtype: str = "float32"
) -> Embedded:
    """Read and embed one batch; what cannot be read or embedded is listed."""
    return embed_audio(teacher, read_batch(batch), dtype)

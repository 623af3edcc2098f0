"""Embeddings computed while a quantizer trains on them, instead of stored."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espnet2_spear.fileio.shards import fingerprint
from espnet2_spear.fileio.utterances import Utterance, make_batches
from espnet2_spear.mvq.embeddings import EmbeddingError
from espnet2_spear.teachers.base import Teacher
from espnet2_spear.teachers.extract import embed_batch

HELD_OUT_SHARE = 0.05
MAX_HELD_OUT = 10_000


class TeacherFrames:
    """Frames of audio, embedded in blocks of some utterances as training asks for them.

    One block is in memory at a time and serves some steps. Which one a step uses
    depends on the seed and the step alone, so that a resumed training sees the same.
    Whole utterances, 5 % of all frames and at most 10 000, are held out.

    Args:
        teacher: on the device to compute on.
        utterances: at least two.
        source: names them in messages.
        seed: of the division in blocks.
        block_frames: embeddings in a block, about; 50 000 of 1024 take 200 MB.
        steps_per_block: training steps on one block.
        batch_seconds: bound of a batch's audio, padding included.

    Attributes:
        index, dim, num_train, num_held_out, source: see ``TrainingFrames``; the
            numbers are of the frames that are expected of the utterances' lengths.
        failed: utterance -> why it could not be embedded, as far as known.

    Raises:
        EmbeddingError: fewer than two utterances.
    """

    def __init__(
        self,
        teacher: Teacher,
        utterances: Sequence[Utterance],
        source: str,
        seed: int = 0,
        block_frames: int = 50_000,
        steps_per_block: int = 100,
        batch_seconds: float = 20.0,
    ) -> None:
        self.teacher, self.source, self.dim = teacher, source, teacher.dim
        self.steps_per_block, self.batch_seconds = steps_per_block, batch_seconds
        self.index: dict[str, Any] = {
            "teacher": teacher.describe(),
            "frame_rate": teacher.frame_rate,
        }
        self.failed: dict[str, str] = {}
        options = {"block": block_frames, "steps": steps_per_block, "seed": seed}
        self._fingerprint = fingerprint(teacher, utterances, options)
        if len(utterances) < 2:
            raise EmbeddingError(
                f"{source}: {len(utterances)} utterances are too few to train a "
                "quantizer on"
            )
        lengths = torch.tensor([u.samples for u in utterances], dtype=torch.int64)
        frames = teacher.output_lengths(lengths).clamp(min=0).tolist()
        order = np.random.default_rng(seed).permutation(len(utterances)).tolist()
        limit = min(MAX_HELD_OUT, HELD_OUT_SHARE * sum(frames))
        count = 0
        while len(order) > 1 and (count == 0 or count + frames[order[0]] <= limit):
            count += frames[order[0]]
            order.pop(0)
        held_out = set(range(len(utterances))) - set(order)
        self._held_out = [utterances[i] for i in sorted(held_out)]
        self.num_held_out, self.num_train = count, sum(frames) - count
        self._blocks: list[list[Utterance]] = []
        size = block_frames
        for i in order:
            if size >= block_frames:
                self._blocks.append([])
                size = 0
            self._blocks[-1].append(utterances[i])
            size += frames[i]
        self._seed = seed
        self._loaded: tuple[int, Tensor] | None = None
        self._held_out_frames: Tensor | None = None

    def fingerprint(self) -> str:
        """Hash of teacher, utterances and options."""
        return self._fingerprint

    def train_batch(self, size: int, seed: int, step: int) -> Tensor:
        """Training frames (size, dim) of the step's block, drawn with replacement."""
        frames = self._block(self.block_of(step))
        rng = np.random.default_rng([seed, step])
        return frames[torch.from_numpy(rng.integers(0, len(frames), size))]

    def block_of(self, step: int) -> int:
        """Number of the block that a step uses; all once, in a new order each time."""
        turn, place = divmod(step // self.steps_per_block, len(self._blocks))
        order = np.random.default_rng([self._seed, 1, turn])
        return int(order.permutation(len(self._blocks))[place])

    def train_sample(self, count: int, seed: int) -> Tensor:
        """At most ``count`` different frames of the first step's block."""
        frames = self._block(self.block_of(0))
        order = np.random.default_rng(seed).permutation(len(frames))[:count]
        return frames[torch.from_numpy(order)]

    def train_chunks(self, count: int, seed: int) -> Iterator[Tensor]:
        """As :meth:`train_sample`, as one part."""
        yield self.train_sample(count, seed)

    def held_out_frames(self, count: int | None = None) -> Tensor:
        """Held-out frames (frames, dim): all, or ``count`` spread evenly."""
        if self._held_out_frames is None:
            self._held_out_frames = self._embed(self._held_out)
        frames = self._held_out_frames
        count = min(count or len(frames), len(frames))
        return frames[torch.arange(count) * len(frames) // count]

    def _block(self, number: int) -> Tensor:
        if self._loaded is None or self._loaded[0] != number:
            self._loaded = None  # never two of them in memory
            self._loaded = (number, self._embed(self._blocks[number]))
        return self._loaded[1]

    def _embed(self, utterances: Sequence[Utterance]) -> Tensor:
        parts: list[Tensor] = []
        for batch in make_batches(utterances, self.batch_seconds):
            result = embed_batch(self.teacher, batch)
            # Out of inference mode, in which the teacher ran: training needs them.
            parts += [frames.cpu().clone() for frames in result.frames]
            for utt, reason in result.failed:
                if utt not in self.failed:
                    logging.warning(f"skipped {utt}: {reason}")
                self.failed[utt] = reason
        if not parts:
            raise EmbeddingError(
                f"{self.source}: none of {len(utterances)} utterances of a block could "
                "be embedded (reasons above)"
            )
        return torch.cat(parts).float()

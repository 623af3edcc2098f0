"""A teacher's embeddings of audio as training data of a quantizer.

:func:`store_embeddings` writes them to disk in shards, :class:`TeacherFrames` computes
them block by block while the quantizer trains.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espnet2_spear.errors import UserError
from espnet2_spear.fileio.atomic import write_json
from espnet2_spear.fileio.shards import (
    Batches,
    DoneMarks,
    fingerprint,
    shard_stem,
    split_into_shards,
)
from espnet2_spear.fileio.utterances import Utterance, lengths_of, make_batches
from espnet2_spear.mvq.embedding_set import (
    HELD_OUT_SHARE,
    INDEX,
    MAX_HELD_OUT,
)
from espnet2_spear.teachers.base import Teacher, TeacherError
from espnet2_spear.teachers.embed import embed_batch

BATCH_SECONDS = 20.0  # of audio, padding included
BLOCK_FRAMES = 50_000  # about; of 1024 channels they take 200 MB
STEPS_PER_BLOCK = 100


def choose(
    utterances: Sequence[Utterance], teacher: Teacher, max_frames: int, seed: int
) -> Sequence[Utterance]:
    """Choose utterances at random until they hold ``max_frames`` embeddings.

    Args:
        utterances: to choose from; those too short or too long for the teacher are
            kept out of the count.
        max_frames: 0 for all utterances.
        seed: of the choice.
    """
    if max_frames == 0:
        return utterances
    lengths = lengths_of(utterances)
    frames = teacher.output_lengths(torch.from_numpy(lengths)).numpy()
    longest = teacher.max_samples or np.inf
    fits = (lengths >= teacher.min_samples) & (lengths <= longest)
    order = np.random.default_rng(seed).permutation(len(utterances))
    reached = np.cumsum(frames[order] * fits[order])
    count = np.searchsorted(reached, max_frames) + 1
    return [utterances[i] for i in order[:count]]


def store_embeddings(
    teacher: Teacher,
    utterances: Sequence[Utterance],
    output_dir: str | Path,
    batch_seconds: float = BATCH_SECONDS,
    shard_seconds: float = 600.0,
    dtype: str = "float16",
    compute_dtype: str = "float32",
) -> dict[str, Any]:
    """Write embeddings to ``embeddings.<shard>.npy`` and list them in an index.

    The index ``embeddings.json`` appears last: {"dim", "frame_rate", "teacher":
    result of ``Teacher.describe``, "dtype", "files": [{"file", "frames"}], "failed":
    [[utterance, reason]]}; files are relative to its folder and hold (frames, dim).
    A killed run goes on with the first unfinished shard.

    Args:
        teacher: on the device to compute on.
        utterances: what to embed.
        output_dir: made if it is not there.
        batch_seconds: bound of a batch's audio, padding included.
        shard_seconds: audio in a file.
        dtype: ``float16`` or ``float32``, as stored.
        compute_dtype: ``float32``, or ``bfloat16`` or ``float16`` for autocast.

    Returns:
        the index.

    Raises:
        TeacherError: not one utterance could be embedded, or an embedding is too large
            for ``dtype``.
    """
    folder = Path(output_dir)
    facts = {
        **teacher.describe(),
        "batch": batch_seconds,
        "shard": shard_seconds,
        "dtype": dtype,
        "compute_dtype": compute_dtype,
    }
    marks = DoneMarks(folder, "embeddings", fingerprint(facts, utterances))
    marks.clear_stale()
    (folder / INDEX).unlink(missing_ok=True)
    shards = split_into_shards(make_batches(utterances, batch_seconds), shard_seconds)

    def compute(todo: list[int]) -> Iterator[tuple[int, Any, list[Path]]]:
        for i in todo:
            path = folder / _file(i)
            record = _store_shard(teacher, shards[i], path, dtype, compute_dtype)
            yield i, record, [path] if record["frames"] else []

    records = marks.records(shards, compute)
    index = {
        "dim": teacher.dim,
        "frame_rate": teacher.frame_rate,
        "teacher": teacher.describe(),
        "dtype": dtype,
        "files": [
            {"file": _file(i), "frames": record["frames"]}
            for i, record in enumerate(records)
            if record["frames"]
        ],
        "failed": [failure for record in records for failure in record["failed"]],
    }
    for utt, reason in index["failed"]:
        logging.warning(f"skipped {utt}: {reason}")
    if not index["files"]:
        raise TeacherError(
            f"{folder}: none of the {len(utterances)} utterances could be embedded "
            "(reasons above)"
        )
    write_json(folder / INDEX, index)
    return index


def _file(shard: int) -> str:
    return f"{shard_stem('embeddings', shard)}.npy"


def _store_shard(
    teacher: Teacher, batches: Batches, path: Path, dtype: str, compute_dtype: str
) -> dict[str, Any]:
    results = [embed_batch(teacher, batch, compute_dtype) for batch in batches]
    # Once more, each alone: a file server may have been busy for a moment.
    again = {utt for result in results for utt, _ in result.failed}
    second = [
        embed_batch(teacher, [utterance], compute_dtype)
        for batch in batches
        for utterance in batch
        if utterance.utt in again
    ]
    results += second
    failed = [failure for result in second for failure in result.failed]
    frames = [x.cpu().numpy() for result in results for x in result.tensors]
    if not frames:
        return {"frames": 0, "failed": failed}
    matrix = np.concatenate(frames)
    if np.abs(matrix).max() > np.finfo(dtype).max:
        raise TeacherError(f"{path}: embeddings exceed {dtype}; use --dtype float32")
    path.parent.mkdir(exist_ok=True)
    np.save(path, matrix.astype(dtype))
    return {"frames": len(matrix), "failed": failed}


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

    Attributes:
        index, dim, num_train, num_held_out, source: see ``TrainingFrames``; the
            numbers are of the frames that are expected of the utterances' lengths.
        failed: utterance -> why it could not be embedded, as far as known.

    Raises:
        UserError: fewer than two utterances.
    """

    def __init__(
        self,
        teacher: Teacher,
        utterances: Sequence[Utterance],
        source: str,
        seed: int = 0,
    ) -> None:
        self.teacher, self.source, self.dim = teacher, source, teacher.dim
        self.index: dict[str, Any] = {
            "teacher": teacher.describe(),
            "frame_rate": teacher.frame_rate,
        }
        self.failed: dict[str, str] = {}
        options = {"block": BLOCK_FRAMES, "steps": STEPS_PER_BLOCK, "seed": seed}
        facts = {**teacher.describe(), **options}
        self._fingerprint = fingerprint(facts, utterances)
        if len(utterances) < 2:
            raise UserError(
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
        size = BLOCK_FRAMES
        for i in order:
            if size >= BLOCK_FRAMES:
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
        turn, place = divmod(step // STEPS_PER_BLOCK, len(self._blocks))
        order = np.random.default_rng([self._seed, 1, turn])
        return int(order.permutation(len(self._blocks))[place])

    def train_sample(self, count: int, seed: int) -> Tensor:
        """At most ``count`` different frames of the first step's block."""
        frames = self._block(self.block_of(0))
        order = np.random.default_rng(seed).permutation(len(frames))[:count]
        return frames[torch.from_numpy(order)]

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
        for batch in make_batches(utterances, BATCH_SECONDS):
            result = embed_batch(self.teacher, batch)
            # Out of inference mode, in which the teacher ran: training needs them.
            parts += [frames.cpu().clone() for frames in result.tensors]
            for utt, reason in result.failed:
                if utt not in self.failed:
                    logging.warning(f"skipped {utt}: {reason}")
                self.failed[utt] = reason
        if not parts:
            raise UserError(
                f"{self.source}: none of {len(utterances)} utterances of a block could "
                "be embedded (reasons above)"
            )
        return torch.cat(parts).float()

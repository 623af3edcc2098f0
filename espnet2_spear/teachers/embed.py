"""Store a teacher's embeddings of audio, as training data of a quantizer."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from espnet2_spear.fileio.shards import (
    Batches,
    DoneMarks,
    Progress,
    deal,
    fingerprint,
    write_text,
)
from espnet2_spear.fileio.utterances import Utterance, lengths_of, make_batches
from espnet2_spear.teachers.base import Teacher, TeacherError
from espnet2_spear.teachers.extract import embed_batch

INDEX = "embeddings.json"


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
    lengths = torch.from_numpy(lengths_of(utterances))
    frames = teacher.output_lengths(lengths).clamp(min=0)
    chosen, count = [], 0
    for i in np.random.default_rng(seed).permutation(len(utterances)):
        if count >= max_frames:
            break
        chosen.append(utterances[i])
        samples = utterances[i].samples
        if samples >= teacher.min_samples and (
            teacher.max_samples is None or samples <= teacher.max_samples
        ):
            count += int(frames[i])
    return chosen


def store_embeddings(
    teacher: Teacher,
    utterances: Sequence[Utterance],
    output_dir: str | Path,
    batch_seconds: float = 20.0,
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
    options = {"batch": batch_seconds, "shard": shard_seconds, "dtype": dtype}
    options["compute_dtype"] = compute_dtype
    marks = DoneMarks(folder, "embeddings", fingerprint(teacher, utterances, options))
    marks.clear_stale()
    (folder / INDEX).unlink(missing_ok=True)
    shards = deal(make_batches(utterances, batch_seconds), shard_seconds)
    todo = [i for i in range(len(shards)) if marks.read(i) is None]
    if len(todo) < len(shards):
        logging.info(f"{len(shards) - len(todo)} of {len(shards)} shards are done")
    progress = Progress(sum(shards.seconds(i) for i in todo), len(todo))
    for i in todo:
        record = _store_shard(
            teacher, shards[i], folder / _file(i), dtype, compute_dtype
        )
        marks.write(i, record)
        progress.add(shards.seconds(i))
    records = [marks.read(i) or {} for i in range(len(shards))]
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
    write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")
    return index


def _file(shard: int) -> str:
    return f"embeddings.{shard}.npy"


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
    frames = [x.cpu().numpy() for result in results for x in result.frames]
    if not frames:
        return {"frames": 0, "failed": failed}
    matrix = np.concatenate(frames)
    if np.abs(matrix).max() > np.finfo(dtype).max:
        raise TeacherError(f"{path}: embeddings exceed {dtype}; use --dtype float32")
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.save(file, matrix.astype(dtype))
    part.replace(path)
    return {"frames": len(matrix), "failed": failed}

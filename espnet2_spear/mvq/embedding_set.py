"""Embeddings of a teacher as training data: their interface, and those on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from espnet2_spear.errors import UserError
from espnet2_spear.fileio.hashes import digest_of

INDEX = "embeddings.json"
SEGMENT = 500  # neighbouring frames are alike: they are held out together
MAX_HELD_OUT = 10000
HELD_OUT_SHARE = 0.05


class TrainingFrames(Protocol):
    """Interface of embeddings as training data: stored ones, or computed on demand.

    Attributes:
        source: names them in messages.
        dim: D.
        index: facts about them; of interest are ``teacher`` and ``frame_rate``.
        num_train, num_held_out: frames to train on and held out.
    """

    source: str
    dim: int
    index: dict[str, Any]
    num_train: int
    num_held_out: int

    def fingerprint(self) -> str:
        """Hash of what the frames depend on."""

    def train_batch(self, size: int, seed: int, step: int) -> Tensor:
        """Training frames float32 (size, D), the same for the same seed and step."""

    def train_sample(self, count: int, seed: int) -> Tensor:
        """At most ``count`` different training frames float32 (frames, D)."""

    def held_out_frames(self, count: int | None = None) -> Tensor:
        """Frames float32 (frames, D) that training never sees, at most ``count``."""


class EmbeddingSet:
    """Frames of a folder of ``.npy`` files, memory-mapped, in two parts.

    The folder holds ``embeddings.json`` ({"dim", "frame_rate", "teacher", "files":
    [{"file", "frames"}]}) and the files it lists, float16 or float32 (frames, dim).
    Runs of 500 neighbouring frames, 5 % of all frames and at most 10 000, are held
    out. No frame stays in memory.

    Args:
        folder: as written by ``spear_embed``.
        seed: which frames are held out.

    Attributes:
        index: what embeddings.json says.
        num_train, num_held_out: frames in the two parts.

    Raises:
        UserError: a missing or malformed file, named, or a negative seed.
    """

    def __init__(self, folder: str | os.PathLike[str], seed: int = 0) -> None:
        if seed < 0:
            raise UserError(f"seed is {seed}; at least 0")
        self.folder, self.source = Path(folder), os.fspath(folder)
        self.index = _read_index(self.folder / INDEX)
        self.dim: int = self.index["dim"]
        self._paths = [self.folder / f["file"] for f in self.index["files"]]
        self._files = [
            self._open(path, f["frames"])
            for path, f in zip(self._paths, self.index["files"], strict=True)
        ]
        counts = [len(file) for file in self._files]
        self._file_starts = np.concatenate([[0], np.cumsum(counts)])
        total = int(self._file_starts[-1])
        length = min(SEGMENT, max(1, total // 100))
        segments = np.arange(0, total, length)
        if len(segments) < 2:
            raise UserError(
                f"{self.folder}: {total} frames are too few to train a quantizer; "
                "embed more audio (recipe stage 4)"
            )
        wanted = min(MAX_HELD_OUT, HELD_OUT_SHARE * total)
        order = np.random.default_rng(seed).permutation(len(segments))
        held_out = np.sort(order[: max(1, int(wanted / length))])
        self._length = length
        self._train, self._held_out = np.delete(segments, held_out), segments[held_out]
        self.num_train, self.num_held_out = (
            int(np.minimum(length, total - starts).sum())
            for starts in (self._train, self._held_out)
        )

    def _open(self, path: Path, frames: int) -> np.ndarray:
        remedy = "embed again (recipe stage 4)"
        try:
            file = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: missing or truncated ({error}); {remedy}"
            ) from error
        if file.shape != (frames, self.dim) or file.dtype.kind != "f":
            raise UserError(
                f"{path}: holds {file.dtype} {file.shape}, but {INDEX} says "
                f"({frames}, {self.dim}); {remedy}"
            )
        return file

    def fingerprint(self) -> str:
        """Hash of the index: which teacher, which files, how many frames."""
        return digest_of(self.index)

    def train_frames(self, which: np.ndarray) -> Tensor:
        """Frames float32 (len(which), dim) of the training part by number."""
        return self._read(self._train, which)

    def held_out_frames(self, count: int | None = None) -> Tensor:
        """Held-out frames float32 (frames, dim): all, or ``count`` spread evenly."""
        count = min(count or self.num_held_out, self.num_held_out)
        which = np.arange(count) * self.num_held_out // count
        return self._read(self._held_out, which)

    def train_sample(self, count: int, seed: int) -> Tensor:
        """At most ``count`` different training frames, drawn at random."""
        count = min(count, self.num_train)
        rng = np.random.default_rng(seed)
        return self.train_frames(rng.choice(self.num_train, count, replace=False))

    def train_batch(self, size: int, seed: int, step: int) -> Tensor:
        """Training frames (size, dim), drawn with replacement by seed and step."""
        rng = np.random.default_rng([seed, step])
        return self.train_frames(rng.integers(0, self.num_train, size))

    def _read(self, starts: np.ndarray, which: np.ndarray) -> Tensor:
        """Frames float32 by their number in a part, in the order given.

        Args:
            starts: of the part's segments, of which only the last may be shorter.
            which: numbers, without the gaps between the segments.
        """
        frames = starts[which // self._length] + which % self._length
        order = np.argsort(frames, kind="stable")  # read the disk forwards
        frames = frames[order]
        result = np.empty((len(frames), self.dim), np.float32)
        cuts = np.searchsorted(frames, self._file_starts)
        for n in np.flatnonzero(np.diff(cuts)):
            rows = frames[cuts[n] : cuts[n + 1]] - self._file_starts[n]
            values = self._files[n][rows]
            finite = np.isfinite(values).all(axis=1)
            if not finite.all():
                raise UserError(
                    f"{self._paths[n]}: frame {rows[~finite][0]} holds NaN or "
                    "infinity; check the teacher and its audio, or store float32 if "
                    "the values overflow float16, and embed again (recipe stage 4)"
                )
            result[order[cuts[n] : cuts[n + 1]]] = values
        return torch.from_numpy(result)


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        list(map(int, [index["dim"], *(f["frames"] for f in index["files"])]))
        [f["file"] for f in index["files"]]
        if not isinstance(index.get("teacher"), dict | None):
            raise TypeError("teacher is no object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: missing or malformed ({error!r}); write it with "
            "espnet2_spear.bin.spear_embed (recipe stage 4)"
        ) from error
    return index

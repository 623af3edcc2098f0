"""Hidden states of many recordings: long ones in pieces, work in shards with marks."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espnet2_spear.constants import SAMPLE_RATE, SAMPLES_PER_FRAME
from espnet2_spear.errors import UserError
from espnet2_spear.fileio.audio import AudioError, Span, read_pieces, resample
from espnet2_spear.fileio.datadir import write_table
from espnet2_spear.fileio.feature_files import (
    ArkFeatures,
    FeatureFiles,
    NpyFeatures,
)
from espnet2_spear.fileio.shards import (
    Batches,
    DoneMarks,
    fingerprint,
    shard_stem,
    split_into_shards,
)
from espnet2_spear.fileio.utterances import make_batches
from espnet2_spear.hub.recordings import Failures, Recording, read_ahead
from espnet2_spear.hub.teacher import sha256_of_tensors
from espnet2_spear.spear.student import SpearEncoder, SpearOutput

OUTPUT = "output"  # the final output, in place of a layer's number
# Cuts lie on multiples of it: whole samples at any rate, and a multiple of what all
# stacks of the student step over (2560 samples), so that pieces see the same frames.
GRID_SECONDS = 4
LayerName = int | str


def parse_layers(
    text: str, num_layers: int, option: str = "--layer"
) -> list[LayerName]:
    """Read an option such as ``last``, ``all``, ``output`` or ``0,3,-1``.

    Layers count from 0, or from -1 downwards from the last one.

    Raises:
        UserError: no such layer, or one given twice.
    """
    if text == "all":
        return list(range(num_layers))
    layers: list[LayerName] = []
    for word in text.split(","):
        word = "-1" if word.strip() == "last" else word.strip()
        if word == OUTPUT:
            layers.append(OUTPUT)
            continue
        number = int(word) if word.removeprefix("-").isdecimal() else num_layers
        if not -num_layers <= number < num_layers:
            raise UserError(
                f"{option} {text}: the model has layers 0 to {num_layers - 1}; give "
                "such numbers with commas between, last, all or output"
            )
        layers.append(number % num_layers)
    if len(set(layers)) < len(layers):
        raise UserError(f"{option} {text}: names a layer twice")
    return layers


class Extractor:
    """Computes layers of a student.

    Args:
        model: in eval mode, on the device to compute on.
        layers: as of :func:`parse_layers`.
        max_seconds: longer recordings are encoded in pieces of at most this length.
        context_seconds: what a piece sees beyond its ends, where there is any.

    Raises:
        UserError: pieces without room for anything but context, or without any
            context, whose last frames would be missing.
    """

    def __init__(
        self,
        model: SpearEncoder,
        layers: Sequence[LayerName],
        max_seconds: float = 60.0,
        context_seconds: float = 8.0,
    ) -> None:
        self.model, self.layers = model, list(layers)
        self.device = next(model.parameters()).device
        grid = GRID_SECONDS * SAMPLE_RATE
        self.context = math.ceil(context_seconds / GRID_SECONDS) * grid
        self.longest = round(max_seconds * SAMPLE_RATE)
        self.step = (self.longest - 2 * self.context) // grid * grid
        if self.step < grid or self.context < grid:
            raise UserError(
                f"--max_seconds {max_seconds:g} --context_seconds {context_seconds:g}: "
                f"pieces need {GRID_SECONDS} s beside twice the context (rounded up to "
                f"multiples of {GRID_SECONDS} s), which cannot be 0"
            )

    def is_long(self, recording: Recording) -> bool:
        """Whether it is encoded in pieces."""
        return recording.samples > self.longest

    def read(self, recording: Recording, spans: Sequence[Span]) -> Iterator[np.ndarray]:
        """Yield pieces (samples,) at 16 kHz.

        Raises:
            AudioError: unreadable, or too short for one frame.
        """
        for samples, info in read_pieces(recording.path, spans):
            if isinstance(samples, AudioError):
                raise samples
            speech = resample(samples, info.rate, SAMPLE_RATE)
            if len(speech) < self.model.min_samples:
                raise AudioError(
                    recording.path,
                    "too_short",
                    f"{len(speech)} samples at 16 kHz are shorter than one frame, "
                    f"which needs {self.model.min_samples}",
                    "leave it out",
                )
            yield speech

    @torch.inference_mode()
    def encode(self, audio: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """Encode a batch of 16 kHz recordings: of each, its layers (T, C) float32.

        Raises:
            UserError: the device has too little memory.
        """
        lengths = torch.tensor([len(x) for x in audio], device=self.device)
        tensors = [torch.from_numpy(x) for x in audio]
        speech = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        try:
            out = self.model(speech.to(self.device), lengths)
            found = [self._layer(out, layer) for layer in self.layers]
            arrays = [(x.float().cpu().numpy(), n.tolist()) for x, n in found]
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(
                f"{self.device}: out of memory with {speech.numel() / SAMPLE_RATE:.0f} "
                "s of audio; lower --batch_seconds and --max_seconds"
            ) from error
        return [[x[i, : frames[i]] for x, frames in arrays] for i in range(len(audio))]

    def encode_long(self, recording: Recording) -> Iterator[list[np.ndarray]]:
        """Yield blocks of frames of all layers, piece by piece.

        Near the cuts frames differ slightly from those of the whole recording, as
        attention does not reach further than the piece.

        Raises:
            AudioError: as :meth:`read`.
        """
        whole, begin = recording.span, recording.span.start or 0.0
        spans = []
        for piece in range(math.ceil((recording.samples - self.context) / self.step)):
            first = max(0, piece * self.step - self.context) / SAMPLE_RATE
            end = ((piece + 1) * self.step + self.context) / SAMPLE_RATE
            spans.append(whole._replace(start=begin + first, end=begin + end))
        spans[-1] = spans[-1]._replace(end=whole.end)
        for piece, speech in enumerate(self.read(recording, spans)):
            block = self.encode([speech])[0]
            yield [
                self._kept(x, layer, piece, piece == len(spans) - 1)
                for x, layer in zip(block, self.layers, strict=True)
            ]

    def _kept(
        self, frames: np.ndarray, layer: LayerName, piece: int, last: bool
    ) -> np.ndarray:
        """A piece's frames without those of its context."""
        hop = SAMPLES_PER_FRAME
        if layer == OUTPUT:
            hop *= self.model.config.output_downsampling_factor
        first = min(piece * self.step, self.context) // hop
        return frames[first:] if last else frames[first : first + self.step // hop]

    def _layer(self, out: SpearOutput, layer: LayerName) -> tuple[Tensor, Tensor]:
        if layer == OUTPUT:
            return out.encoder_out, out.encoder_out_lens
        return out.hidden_states[int(layer)], out.hidden_states_lens


# --- A run over many recordings -------------------------------------------------------


@dataclass
class ExtractionRun:
    """Features of a set of recordings, in one folder.

    Attributes:
        extractor: computes them.
        folder: made if it is not there.
        format: ``ark`` or ``npy``.
        dtype: of npy.
        batch_seconds: audio in a batch, padding included.
        shard_seconds: audio in a shard.
        num_workers: threads that read audio ahead.
        frames: of each recording whose features are there.
        skipped: of each other recording its reason, in a word, and the message.
    """

    extractor: Extractor
    folder: Path
    format: str = "ark"
    dtype: str = "float32"
    batch_seconds: float = 60.0
    shard_seconds: float = 600.0
    num_workers: int = 2
    frames: dict[str, int] = field(default_factory=dict)
    skipped: Failures = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the layers' tables."""
        names = [
            f"layer{x}" if isinstance(x, int) else x for x in self.extractor.layers
        ]
        return names if len(names) > 1 else ["feats"]

    def describe(self) -> dict[str, Any]:
        """Everything but the recordings that the features depend on."""
        extractor = self.extractor
        return {
            "weights": sha256_of_tensors(extractor.model.state_dict()),
            "config": repr(extractor.model.config),
            "layers": extractor.layers,
            "pieces": [extractor.longest, extractor.step, extractor.context],
            "folder": str(self.folder),
            "form": [self.format, self.dtype, self.batch_seconds, self.shard_seconds],
        }

    def __call__(
        self, recordings: Sequence[Recording], skipped: Failures
    ) -> list[Path]:
        """Compute what is not there yet.

        Writes a table a layer (``feats.scp``, or ``layer<n>.scp`` of several), and
        ``utt2num_frames`` and ``skipped.txt``.

        Args:
            recordings: what to encode.
            skipped: what could not even be opened.

        Returns:
            the tables of the layers.

        Raises:
            UserError: an utterance whose name is no file name (npy), or too little
                memory.
        """
        if self.format == "npy":
            for recording in recordings:
                if "/" in recording.utt or recording.utt.startswith("."):
                    raise UserError(
                        f"utterance '{recording.utt}' cannot be a file's name; use "
                        "--format ark"
                    )
        number = sum(map(self.extractor.is_long, recordings))
        if number:
            logging.warning(
                f"{number} recordings are longer than "
                f"{self.extractor.longest / SAMPLE_RATE:g} s and encoded in "
                "overlapping pieces: near the cuts, their frames differ slightly from "
                "those of the whole (see --max_seconds)"
            )
        batches = make_batches(recordings, self.batch_seconds)
        shards = split_into_shards(batches, self.shard_seconds)
        run = fingerprint(self.describe(), recordings)
        marks = DoneMarks(self.folder, "feats", run)
        if marks.clear_stale():  # tables of them would point into other features
            tables_before = ("feats.scp", "output.scp", "layer*.scp", "utt2num_frames")
            for path in [p for name in tables_before for p in self.folder.glob(name)]:
                path.unlink()
        self.skipped = dict(skipped)
        tables: list[dict[str, str]] = [{} for _ in self.names]
        for record in marks.records(
            shards, lambda todo: (self._shard(i, shards[i]) for i in todo)
        ):
            for utt, frames, specs in record["utts"]:
                self.frames[utt] = frames
                for table, spec in zip(tables, specs, strict=True):
                    table[utt] = spec
            self.skipped |= {u: tuple(why) for u, why in record["failed"].items()}
        return self._write_tables(tables)

    def _shard(self, number: int, batches: Batches) -> tuple[int, Any, list[Path]]:
        """Encode a shard; returns its number, its record and the files written."""
        failed: Failures = {}
        utts = []
        with ExitStack() as stack:
            files = [
                stack.enter_context(self._files(number, name)) for name in self.names
            ]
            audio = read_ahead(self._read, batches, self.num_workers)
            for batch, items in zip(batches, audio, strict=True):
                for recording, blocks in self._encoded(batch, items):
                    try:
                        utts.append(_write(recording.utt, blocks, files))
                    except AudioError as error:
                        failed[recording.utt] = (error.reason, str(error))
        paths = [path for file in files for path in file.paths()]
        return number, {"utts": utts, "failed": failed}, paths

    def _files(self, shard: int, name: str) -> FeatureFiles:
        if self.format == "ark":
            stem = self.folder / shard_stem("feats", shard)
            return ArkFeatures(Path(f"{stem}.{name}.ark"))
        return NpyFeatures(self.folder / name, self.dtype)

    def _read(self, batch: Sequence[Recording]) -> list[np.ndarray | AudioError | None]:
        """Audio of a batch, or why there is none; None: it is too long for memory."""
        audio: list[np.ndarray | AudioError | None] = []
        for recording in batch:
            try:
                if self.extractor.is_long(recording):
                    audio.append(None)
                else:
                    audio += self.extractor.read(recording, [recording.span])
            except AudioError as error:
                audio.append(error)
        return audio

    def _encoded(
        self, batch: Sequence[Recording], audio: list[np.ndarray | AudioError | None]
    ) -> Iterator[tuple[Recording, AudioError | Iterable[list[np.ndarray]]]]:
        """Yield recordings with the blocks of their layers, or why there are none."""
        short = [x for x in audio if isinstance(x, np.ndarray)]
        features = iter(self.extractor.encode(short) if short else [])
        for recording, item in zip(batch, audio, strict=True):
            if item is None:
                yield recording, self.extractor.encode_long(recording)
            elif isinstance(item, AudioError):
                yield recording, item
            else:
                yield recording, [next(features)]

    def _write_tables(self, tables: list[dict[str, str]]) -> list[Path]:
        paths = [self.folder / f"{name}.scp" for name in self.names]
        for path, table in zip(paths, tables, strict=True):
            write_table(path, table)
        write_table(self.folder / "utt2num_frames", self.frames)
        # On one line each, the file's name first in the message.
        lines = {
            utt: f"{reason} {' '.join(text.split())}"
            for utt, (reason, text) in self.skipped.items()
        }
        write_table(self.folder / "skipped.txt", lines)
        return paths


def _write(
    utt: str,
    blocks: AudioError | Iterable[list[np.ndarray]],
    files: Sequence[FeatureFiles],
) -> tuple[str, int, list[str]]:
    """Write all layers of an utterance side by side: name, frames, where they are.

    Raises:
        AudioError: nothing or not all could be read; nothing of the utterance stays.
    """
    if isinstance(blocks, AudioError):
        raise blocks
    with ExitStack() as stack:
        matrices = [stack.enter_context(file.matrix(utt)) for file in files]
        for layers in blocks:
            for matrix, block in zip(matrices, layers, strict=True):
                matrix.append(block)
    return utt, matrices[-1].rows, [matrix.spec for matrix in matrices]

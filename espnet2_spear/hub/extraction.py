"""Hidden states of many recordings: long ones in pieces, work in shards with marks."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.errors import UserError
from espnet2_spear.fileio.audio import AudioError, read_pieces, resample
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
    split_into_shards,
)
from espnet2_spear.fileio.utterances import make_batches
from espnet2_spear.hub.recordings import Recording, read_ahead
from espnet2_spear.hub.teacher import sha256_of_tensors
from espnet2_spear.spear.student import SpearEncoder, SpearOutput

OUTPUT = "output"  # the final output, in place of a layer's number
# Cuts lie on multiples of it: whole samples at any rate, and a multiple of what all
# stacks of the student step over (2560 samples), so that pieces see the same frames.
GRID_SECONDS = 4
_SAMPLES_PER_FRAME = 320
Layer = int | str
Failures = dict[str, tuple[str, str]]  # utterance -> reason in a word, message


class ExtractError(UserError):
    """Features cannot be computed at all; the message says what to do."""


def parse_layers(text: str, num_layers: int) -> list[Layer]:
    """Read an option such as ``last``, ``all``, ``output`` or ``0,3,-1``.

    Layers count from 0, or from -1 downwards from the last one.

    Raises:
        ExtractError: no such layer, or one given twice.
    """
    if text == "all":
        return list(range(num_layers))
    layers: list[Layer] = []
    for word in text.split(","):
        word = "-1" if word.strip() == "last" else word.strip()
        if word == OUTPUT:
            layers.append(OUTPUT)
            continue
        number = int(word) if word.removeprefix("-").isdecimal() else num_layers
        if not -num_layers <= number < num_layers:
            raise ExtractError(
                f"--layer {text}: the model has layers 0 to {num_layers - 1}; give "
                "such numbers with commas between, last, all or output"
            )
        layers.append(number % num_layers)
    if len(set(layers)) < len(layers):
        raise ExtractError(f"--layer {text}: names a layer twice")
    return layers


class Extractor:
    """Computes layers of a student.

    Args:
        model: in eval mode, on the device to compute on.
        layers: as of :func:`parse_layers`.
        max_seconds: longer recordings are encoded in pieces of at most this length.
        context_seconds: what a piece sees beyond its ends, where there is any.

    Raises:
        ExtractError: pieces without room for anything but context.
    """

    def __init__(
        self,
        model: SpearEncoder,
        layers: Sequence[Layer],
        max_seconds: float = 60.0,
        context_seconds: float = 8.0,
    ) -> None:
        self.model, self.layers = model, list(layers)
        self.device = next(model.parameters()).device
        grid = GRID_SECONDS * SAMPLE_RATE
        self.context = math.ceil(context_seconds / GRID_SECONDS) * grid
        self.longest = round(max_seconds * SAMPLE_RATE)
        self.step = (self.longest - 2 * self.context) // grid * grid
        if self.step < grid:
            raise ExtractError(
                f"--max_seconds {max_seconds:g} --context_seconds {context_seconds:g}: "
                f"pieces need {GRID_SECONDS} s beside twice the context (rounded up to "
                f"multiples of {GRID_SECONDS} s)"
            )

    def is_long(self, recording: Recording) -> bool:
        """Whether it is encoded in pieces."""
        return recording.samples > self.longest

    def read(self, recording: Recording) -> np.ndarray:
        """Read (samples,) at 16 kHz.

        Raises:
            AudioError: unreadable, or too short for one frame.
        """
        ((samples, info),) = read_pieces(recording.path, [recording.span])
        if isinstance(samples, AudioError):
            raise samples
        return self._checked(recording, resample(samples, info.rate, SAMPLE_RATE))

    @torch.inference_mode()
    def encode(self, audio: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """Encode a batch of 16 kHz recordings: of each, its layers (T, C) float32.

        Raises:
            ExtractError: the device has too little memory.
        """
        lengths = torch.tensor([len(x) for x in audio], device=self.device)
        tensors = [torch.from_numpy(x) for x in audio]
        speech = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        try:
            out = self.model(speech.to(self.device), lengths)
            found = [self._layer(out, layer) for layer in self.layers]
            arrays = [(x.float().cpu().numpy(), n.tolist()) for x, n in found]
        except torch.cuda.OutOfMemoryError as error:
            raise ExtractError(
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
        last = max(1, math.ceil((recording.samples - self.context) / self.step)) - 1
        whole, spans = recording.span, []
        offset = whole.start or 0.0
        for piece in range(last + 1):
            first = max(0, piece * self.step - self.context) / SAMPLE_RATE
            end = ((piece + 1) * self.step + self.context) / SAMPLE_RATE
            stop = whole.end if piece == last else offset + end
            spans.append(whole._replace(start=offset + first, end=stop))
        for piece, (samples, info) in enumerate(read_pieces(recording.path, spans)):
            if isinstance(samples, AudioError):
                raise samples
            speech = resample(samples, info.rate, SAMPLE_RATE)
            block = self.encode([self._checked(recording, speech)])[0]
            yield [
                self._kept(x, layer, piece, piece == last)
                for x, layer in zip(block, self.layers, strict=True)
            ]

    def _kept(
        self, frames: np.ndarray, layer: Layer, piece: int, last: bool
    ) -> np.ndarray:
        """A piece's frames without those of its context."""
        hop = _SAMPLES_PER_FRAME
        if layer == OUTPUT:
            hop *= self.model.config.output_downsampling_factor
        first = min(piece * self.step, self.context) // hop
        return frames[first:] if last else frames[first : first + self.step // hop]

    def _layer(self, out: SpearOutput, layer: Layer) -> tuple[Tensor, Tensor]:
        if layer == OUTPUT:
            return out.encoder_out, out.encoder_out_lens
        return out.hidden_states[int(layer)], out.hidden_states_lens

    def _checked(self, recording: Recording, speech: np.ndarray) -> np.ndarray:
        if len(speech) < self.model.min_samples:
            raise AudioError(
                recording.path,
                "too_short",
                f"{len(speech)} samples at 16 kHz are shorter than one frame, which "
                f"needs {self.model.min_samples}",
                "leave it out",
            )
        return speech


# --- A run over many recordings -------------------------------------------------------


@dataclass(frozen=True)
class RunOptions:
    """How features are batched and stored.

    Attributes:
        format: ``ark`` or ``npy``.
        dtype: of npy.
        batch_seconds: audio in a batch, padding included.
        shard_seconds: audio in a shard.
        num_workers: threads that read audio ahead.
    """

    format: str = "ark"
    dtype: str = "float32"
    batch_seconds: float = 60.0
    shard_seconds: float = 600.0
    num_workers: int = 2


class ExtractionRun:
    """Features of a set of recordings, in one folder.

    Args:
        extractor: computes them.
        folder: made if it is not there.
        options: as above.

    Attributes:
        frames: of each recording whose features are there.
        skipped: of each other recording its reason, in a word, and the message.
    """

    def __init__(self, extractor: Extractor, folder: Path, options: RunOptions) -> None:
        self.extractor, self.folder, self.options = extractor, folder, options
        names = [f"layer{x}" if isinstance(x, int) else x for x in extractor.layers]
        self.names = names if len(names) > 1 else ["feats"]
        self.frames: dict[str, int] = {}
        self.skipped: Failures = {}

    def describe(self) -> dict[str, Any]:
        """What the features depend on besides the recordings."""
        extractor, options = self.extractor, asdict(self.options)
        options.pop("num_workers")
        return {
            "weights": sha256_of_tensors(extractor.model.state_dict()),
            "config": repr(extractor.model.config),
            "layers": extractor.layers,
            "pieces": [extractor.longest, extractor.step, extractor.context],
            "folder": str(self.folder),
            **options,
        }

    def __call__(
        self, recordings: Sequence[Recording], skipped: Sequence[tuple[str, str, str]]
    ) -> list[Path]:
        """Compute what is not there yet.

        Writes a table a layer (``feats.scp``, or ``layer<n>.scp`` of several), and
        ``utt2num_frames`` and ``skipped.txt``.

        Args:
            recordings: what to encode.
            skipped: what could not even be opened: utterance, reason, message.

        Returns:
            the tables of the layers.

        Raises:
            ExtractError: an utterance whose name is no file name (npy), or too little
                memory.
        """
        if self.options.format == "npy":
            check_names(recordings)
        self.folder.mkdir(parents=True, exist_ok=True)
        shards = self._shards(recordings)
        marks = DoneMarks(
            self.folder, "feats", fingerprint(self.describe(), recordings)
        )
        marks.clear_stale()
        self.skipped = {utt: (reason, text) for utt, reason, text in skipped}
        tables: list[dict[str, str]] = [{} for _ in self.names]
        kept = 0
        total = sum(r.samples for r in recordings) / SAMPLE_RATE
        with tqdm(total=round(total), unit="s", disable=None) as bar:
            for number, shard in enumerate(shards):
                record = marks.read(number)
                if record is None:
                    record, paths = self._shard(number, shard, bar)
                    marks.write(number, record, paths)
                else:
                    kept += 1
                    samples = sum(r.samples for batch in shard for r in batch)
                    bar.update(samples / SAMPLE_RATE)
                for utt, frames, specs in record["utts"]:
                    self.frames[utt] = frames
                    for table, spec in zip(tables, specs, strict=True):
                        table[utt] = spec
                self.skipped |= {u: tuple(why) for u, why in record["failed"].items()}
        if kept:
            logging.info(f"{kept} of {len(shards)} shards were there and are kept")
        return self._write_tables(tables)

    def _shards(self, recordings: Sequence[Recording]) -> list[Batches]:
        """Batches of short recordings, dealt out; each long recording by itself."""
        long = [r for r in recordings if self.extractor.is_long(r)]
        short = [r for r in recordings if not self.extractor.is_long(r)]
        if long:
            logging.warning(
                f"{len(long)} recordings are longer than "
                f"{self.extractor.longest / SAMPLE_RATE:g} s and encoded in "
                "overlapping pieces: near the cuts, their frames differ slightly from "
                "those of the whole (see --max_seconds)"
            )
        options, shards = self.options, []
        if short:
            batches = make_batches(short, options.batch_seconds)
            shards = split_into_shards(batches, options.shard_seconds)
        return [*shards, *([[r]] for r in sorted(long, key=lambda r: r.utt))]

    def _shard(
        self, number: int, batches: Batches, bar: tqdm
    ) -> tuple[dict[str, Any], list[Path]]:
        """Encode a shard; returns its record and the files written."""
        failed: Failures = {}
        utts = []
        with ExitStack() as stack:
            files = [
                stack.enter_context(self._files(number, name)) for name in self.names
            ]
            for recording, blocks in self._encoded(batches, failed):
                try:
                    utts.append(_write(recording.utt, blocks, files))
                except AudioError as error:  # in the midst of a long recording
                    failed[recording.utt] = (error.reason, str(error))
                bar.update(recording.samples / SAMPLE_RATE)
        paths = [path for file in files for path in file.paths()]
        return {"utts": utts, "failed": failed}, paths

    def _files(self, shard: int, name: str) -> FeatureFiles:
        if self.options.format == "ark":
            return ArkFeatures(self.folder / f"feats.{shard}.{name}.ark")
        return NpyFeatures(self.folder / name, self.options.dtype)

    def _encoded(
        self, batches: Batches, failed: Failures
    ) -> Iterator[tuple[Recording, Iterator[list[np.ndarray]]]]:
        """Yield recordings with the blocks of their layers; note those that fail."""

        def read(batch: Sequence[Recording]) -> list[np.ndarray | AudioError]:
            audio: list[np.ndarray | AudioError] = []
            for recording in batch:
                try:
                    audio.append(self.extractor.read(recording))
                except AudioError as error:
                    audio.append(error)
            return audio

        if self.extractor.is_long(batches[0][0]):
            recording = batches[0][0]
            yield recording, self.extractor.encode_long(recording)
            return
        ahead = read_ahead(read, batches, self.options.num_workers)
        for batch, audio in zip(batches, ahead, strict=True):
            good = []
            for recording, item in zip(batch, audio, strict=True):
                if isinstance(item, AudioError):
                    failed[recording.utt] = (item.reason, str(item))
                else:
                    good.append((recording, item))
            if not good:
                continue
            features = self.extractor.encode([samples for _, samples in good])
            for (recording, _), layers in zip(good, features, strict=True):
                yield recording, iter([layers])

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


def check_names(recordings: Sequence[Recording]) -> None:
    """See that utterances can be names of files.

    Raises:
        ExtractError: one cannot.
    """
    for recording in recordings:
        if "/" in recording.utt or recording.utt.startswith("."):
            raise ExtractError(
                f"utterance '{recording.utt}' cannot be a file's name; use --format ark"
            )


def _write(
    utt: str, blocks: Iterator[list[np.ndarray]], files: Sequence[FeatureFiles]
) -> tuple[str, int, list[str]]:
    """Write all layers of an utterance side by side: name, frames, where they are.

    Raises:
        AudioError: an unreadable piece; nothing of the utterance stays then.
    """
    with ExitStack() as stack:
        matrices = [stack.enter_context(file.matrix(utt)) for file in files]
        for layers in blocks:
            for matrix, block in zip(matrices, layers, strict=True):
                matrix.append(block)
    return utt, matrices[-1].rows, [matrix.spec for matrix in matrices]

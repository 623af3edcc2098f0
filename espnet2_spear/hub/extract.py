"""Hidden states of recordings, of long ones piece by piece."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.errors import UserError
from espnet2_spear.fileio.audio import AudioError, read_pieces, resample
from espnet2_spear.hub.recordings import Recording
from espnet2_spear.spear.student import SpearEncoder, SpearOutput

OUTPUT = "output"  # the final output, in place of a layer's number
# Cuts lie on multiples of it: whole samples at any rate, and a multiple of what all
# stacks of the student step over (2560 samples), so that pieces see the same frames.
GRID_SECONDS = 4
_SAMPLES_PER_FRAME = 320
Layer = int | str


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

"""A student as a graph: of whole utterances, or called once a chunk, state in and out.

A call of a stream takes a window: the ``2 * chunk + 13`` fbank frames (100 Hz) that a
chunk of frames (50 Hz) depends on beyond its state, or the samples under them. Windows
overlap: each begins ``2 * chunk`` fbank frames behind the one before. All shapes are
fixed but the batch. The outputs are those of the whole utterance, alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from espnet2_spear import __version__
from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.errors import UserError
from espnet2_spear.hub.graph import Network
from espnet2_spear.hub.teacher import sha256_of_tensors
from espnet2_spear.spear.student import MAX_SECONDS, SpearEncoder
from espnet2_spear.zipformer.conv_embed import CONVNEXT_REACH, MIN_FRAMES, silence
from espnet2_spear.zipformer.fbank import FRAME_LENGTH, FRAME_SHIFT, LEFT, log_mel
from espnet2_spear.zipformer.frames import Past

# Fbank frames of a window beyond two for each frame: 7 that the convolutions of the
# embedding take, and the 3 frames that its ConvNeXt block looks ahead.
BEYOND = 7 + 2 * CONVNEXT_REACH


def output_names(layers: Sequence[int]) -> list[str]:
    """Names of a student's outputs."""
    names = ["encoder_out", "encoder_out_lens"]
    if layers:
        names += ["hidden_lens", *(f"hidden_{i:02d}" for i in layers)]
    return names


def student_facts(student: SpearEncoder) -> dict[str, Any]:
    """Facts of the student for the file of a graph."""
    config = student.config
    return {
        "made_by": f"espnet2-spear {__version__}",
        "sample_rate": SAMPLE_RATE,
        "frame_rate": config.frame_rate,
        "hidden_frame_rate": 50.0,
        "num_mel_bins": config.num_mel_bins,
        "dim": student.output_size(),
        "num_layers": student.num_layers,
        "padding": config.padding,
        "weights_sha256": sha256_of_tensors(student.state_dict()),
    }


def length_bounds(
    student: SpearEncoder, waveforms: bool, max_seconds: float
) -> tuple[int, int]:
    """Fewest and most samples, or fbank frames, of an utterance.

    Raises:
        UserError: a bound out of range.
    """
    if not 1 <= max_seconds <= MAX_SECONDS:
        raise UserError(
            f"--max_seconds {max_seconds:g}: from 1 to {MAX_SECONDS}, the longest "
            "utterance that the graph is to take"
        )
    most = int(max_seconds * SAMPLE_RATE)
    if waveforms:
        return student.min_samples, most
    return MIN_FRAMES, most // FRAME_SHIFT


# --- Whole utterances ----------------------------------------------------------------


class OfflineStudent(nn.Module):
    """The student with tensors for results.

    Args:
        student: the network.
        waveforms: whether it takes audio; else fbank.
        layers: whose outputs are returned, counted from 0.
    """

    def __init__(
        self, student: SpearEncoder, waveforms: bool, layers: Sequence[int]
    ) -> None:
        super().__init__()
        self.student, self.waveforms, self.layers = student, waveforms, [*layers]

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """Map audio (B, samples) or fbank (B, T, bins) and lengths (B,)."""
        if self.waveforms:
            x, lengths = self.student.compute_fbank(x, lengths)
        out = self.student.encode(x, lengths, bool(self.layers))
        hidden = [out.hidden_states[i] for i in self.layers]
        lens = [out.hidden_states_lens] if hidden else []
        return out.encoder_out, out.encoder_out_lens, *lens, *hidden


def offline_student(
    student: SpearEncoder,
    waveforms: bool = True,
    layers: Sequence[int] = (),
    max_seconds: float = 60.0,
) -> Network:
    """Describe the graph of a student that is given whole utterances.

    Args:
        student: the network.
        waveforms: take audio, with the fbank in the graph; False: take the fbank.
        layers: whose outputs are returned, counted from 0.
        max_seconds: longest utterance. Attention is not computed in blocks in a graph:
            memory grows with its square.

    Raises:
        UserError: a bound out of range.
    """
    least, most = length_bounds(student, waveforms, max_seconds)
    chosen = [*layers]
    name = "audio" if waveforms else "fbank"
    example = torch.zeros(2, min(most, least * 11))
    if not waveforms:
        example = example[..., None].repeat(1, 1, student.config.num_mel_bins)
    lengths = torch.tensor([example.size(1), least])
    return Network(
        OfflineStudent(student, waveforms, chosen).eval(),
        {name: example, "lengths": lengths},
        output_names(chosen),
        {name: (least, most)},
        student_facts(student)
        | {"kind": "student", "input": name, "layers": chosen}
        | {"min_length": least, "max_length": most},
    )


# --- A chunk a call ------------------------------------------------------------------


class StreamingStudent(nn.Module):
    """A chunk of a stream.

    Args:
        student: a causal network with exact padding.
        waveforms: whether a window is of samples; else of fbank frames.
        layers: whose outputs are returned, counted from 0.
        chunk: frames (50 Hz) of a chunk.
        left: frames of left context.

    Attributes:
        start: the state before the first chunk of a lone utterance, by name.
    """

    def __init__(
        self,
        student: SpearEncoder,
        waveforms: bool,
        layers: Sequence[int],
        chunk: int,
        left: int,
    ) -> None:
        super().__init__()
        self.student, self.waveforms, self.layers = student, waveforms, [*layers]
        self.chunk, self.left = chunk, left
        self.start = self._start()

    def _start(self) -> dict[str, Tensor]:
        """What the network keeps once it has seen enough, emptied."""
        student, config = self.student, self.student.config
        with torch.no_grad():
            fbank = torch.zeros(1, 2 * self.chunk + BEYOND, config.num_mel_bins)
            convolved = student.encoder_embed.convolve(fbank)[:, :, :CONVNEXT_REACH]
            tensors = {"convolved": convolved.contiguous()}
            x = torch.zeros(1, self.chunk, student.output_size())
            lengths = torch.tensor([self.chunk])
            # The slowest stack may make one frame of a chunk.
            for _ in range(max(self.left // self.chunk, *config.cnn_module_kernel) + 1):
                self._encode(x, lengths, tensors, False)
        # Where there was nothing yet, keys are masked as padding is.
        start = {
            k: torch.full_like(v, v.dtype == torch.bool) for k, v in tensors.items()
        }
        return start | {"frames": torch.zeros(1, dtype=torch.long)}

    def _encode(
        self,
        x: Tensor,
        lengths: Tensor,
        tensors: dict[str, Tensor],
        first: bool | Tensor,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        past = Past(tensors, "encoder.")
        chunks = {"chunk": self.chunk, "left_context": self.left}
        return self.student.encoder.streaming_forward(x, lengths, past, first, **chunks)

    def forward(self, x: Tensor, lengths: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Encode a chunk.

        Args:
            x: (B, window) samples or (B, window, bins) fbank.
            lengths: (B,) fbank frames of the window that belong to each utterance:
                all, or less where it ends.
            *state: as in ``start``, or returned by the call before.

        Returns:
            encoder_out (B, chunk or half of it, C), its lengths, hidden lengths and
            hidden states if there are layers, and the new state.
        """
        tensors = dict(zip(self.start, state, strict=True))
        embed, chunk = self.student.encoder_embed, self.chunk
        if self.waveforms:
            fbank = self.student.fbank
            windows = x.unfold(1, FRAME_LENGTH, FRAME_SHIFT)
            x = log_mel(windows, fbank.window, fbank.mel)
        frames = embed.output_lengths(lengths)
        y = silence(embed.convolve(x), frames)
        y = torch.cat([tensors["convolved"], y], dim=2)
        tensors["convolved"] = y[:, :, chunk : chunk + CONVNEXT_REACH]
        y = embed.project(embed.convnext.inner(y))
        lens = frames.clamp(0, chunk)
        seen = tensors["frames"]
        out, out_lens, hidden = self._encode(y, lens, tensors, seen == 0)
        tensors["frames"] = seen + lens
        chosen = [hidden[i] for i in self.layers]
        hidden_lens = [lens] if chosen else []
        new = [tensors[name] for name in self.start]
        return out, out_lens, *hidden_lens, *chosen, *new


def streaming_student(
    student: SpearEncoder,
    waveforms: bool = True,
    layers: Sequence[int] = (),
    chunk_size: int | None = None,
    left_context_frames: int | None = None,
) -> Network:
    """Describe the graph of a causal student that is given a window at a time.

    Args:
        student: a causal network; the outputs are those of exact padding.
        waveforms: windows of samples, with the fbank in the graph; False: of fbank.
        layers: whose outputs are returned, counted from 0.
        chunk_size: frames (50 Hz) of a chunk; None: as configured.
        left_context_frames: None: as configured.

    Raises:
        UserError: a network that is not causal, or without a fixed context.
    """
    config = student.config
    if not config.causal:
        raise UserError(
            "--streaming: the student is not causal (causal: false) and sees whole "
            "utterances; export it without --streaming, or one that was trained causal"
        )
    chunk = config.chunk_size if chunk_size is None else chunk_size
    left = config.left_context_frames
    left = left if left_context_frames is None else left_context_frames
    config.check_chunk(chunk, left)
    if chunk < 0 or left < 0:
        raise UserError(
            f"--streaming: chunk size {chunk} and left context {left} must be fixed in "
            "a graph: say --chunk_size and --left_context_frames, such as 16 and 128"
        )
    chosen = [*layers]
    exact = SpearEncoder(replace(config, padding="exact")).eval()
    exact.load_state_dict(student.state_dict())
    module = StreamingStudent(exact, waveforms, chosen, chunk, left).eval()
    frames = 2 * chunk + BEYOND
    name, size, shift = "fbank", frames, 2 * chunk
    example = torch.zeros(2, frames, config.num_mel_bins)
    if waveforms:
        name, shift = "audio", 2 * chunk * FRAME_SHIFT
        size = (frames - 1) * FRAME_SHIFT + FRAME_LENGTH
        example = torch.zeros(2, size)
    states = {k: torch.cat([v, v]) for k, v in module.start.items()}
    described = {
        k: {"shape": [*v.shape[1:]], "dtype": str(v.dtype)[6:], "start": bool(v.any())}
        for k, v in module.start.items()
    }
    return Network(
        module,
        {name: example, "lengths": torch.tensor([frames, 9])}
        | {f"state.{k}": v for k, v in states.items()},
        [*output_names(chosen), *(f"new.{k}" for k in states)],
        {},
        student_facts(exact)
        | {"kind": "stream", "input": name, "layers": chosen}
        | {"chunk_size": chunk, "left_context_frames": left, "window": size}
        | {"window_shift": shift, "window_fbank_frames": frames}
        | {"samples_before": LEFT if waveforms else 0, "state": described},
    )

"""The student fed piece by piece, with explicit state.

Waveforms become fbank frames (:func:`streaming_fbank`); a causal network embeds them
(:func:`embed_piece`) and encodes them chunk by chunk (:func:`encode_chunks`).
Over all calls the outputs are those of the whole utterances.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from espnet2_spear.spear.checks import (
    InputError,
    check_features,
    check_piece,
    check_samples,
    check_waveforms,
    on_host,
)
from espnet2_spear.zipformer.conv_embed import (
    CONVNEXT_REACH,
    MIN_FRAMES,
    ConvEmbed,
    silence,
)
from espnet2_spear.zipformer.encoder import Zipformer
from espnet2_spear.zipformer.fbank import (
    FRAME_LENGTH,
    FRAME_SHIFT,
    LEFT,
    PADDING_VALUE,
    Fbank,
    num_frames,
)
from espnet2_spear.zipformer.frames import Past


@dataclass(frozen=True)
class FbankState:
    """Samples so far that later frames need.

    Attributes:
        samples: (B, n) the last samples, from ``start`` on.
        start: index of the first of them.
        lengths: (B,) samples of each utterance so far.
        frames: frames that were computed.
    """

    samples: Tensor
    start: int
    lengths: Tensor
    frames: int


def streaming_fbank(
    fbank: Fbank,
    speech: Tensor,
    lengths: Tensor,
    state: FbankState | None = None,
    last: bool = False,
) -> tuple[Tensor, Tensor, FbankState]:
    """Compute the frames that a further piece of the waveforms completes.

    Over all calls the frames are those of ``fbank`` on the whole waveforms. A frame
    is complete when the 280 samples from its shift's start on have come.

    Args:
        fbank: the features.
        speech: (B, n) float in [-1, 1], the next n samples, 16 kHz; any n.
        lengths: (B,) how many of them belong to each utterance: n, or less where it
            ends here; 0 from then on.
        state: what the previous call returned; None at first.
        last: whether all utterances end here.

    Returns:
        frames (B, T, num_mel_bins), 100 Hz, how many of them belong to each utterance,
        and the state for the next call; frames and lengths are what the student's
        ``streaming_forward`` takes.

    Raises:
        InputError: no batch of waveforms, samples with NaN or infinity, pieces that do
            not fit together, or an utterance without samples.
    """
    check_waveforms(speech, lengths, None)
    lengths = lengths.to(speech.device)
    if state is None:
        none = torch.zeros_like(lengths)
        state = FbankState(speech[:, :0], 0, none, 0)
    ended = state.lengths < state.start + state.samples.size(1)
    check_piece(lengths, speech.size(1), state.lengths, ended, int(last), "samples")
    if on_host(speech, lengths):
        check_samples(speech, lengths)
    lengths = state.lengths + lengths
    speech = torch.cat([state.samples, speech], dim=1)
    start, done = state.start, state.frames

    # Frames of the piece, which starts a whole number of shifts into the waveform.
    size, skip = speech.size(1), done - start // FRAME_SHIFT
    ready = (
        num_frames(size) if last else (size - FRAME_LENGTH + LEFT) // FRAME_SHIFT + 1
    )
    if ready <= skip:
        frames = speech.new_zeros(speech.size(0), 0, fbank.num_mel_bins)
        new = FbankState(speech, start, lengths, done)
        return frames, torch.zeros_like(lengths), new
    frames, _ = fbank(speech, (lengths - start).clamp(1, size))
    frames = frames[:, skip:ready]
    # Utterances that have not ended have no partial frame among these.
    frame_lens = (num_frames(lengths) - done).clamp(0, frames.size(1))
    behind = torch.arange(frames.size(1), device=frames.device) >= frame_lens[:, None]
    frames = frames.masked_fill(behind[..., None], PADDING_VALUE)
    done += frames.size(1)
    # One shift more than the next frame's own, so that nothing is mirrored there.
    keep = max(0, done - 1) * FRAME_SHIFT
    new = FbankState(speech[:, keep - start :], keep, lengths, done)
    return frames, frame_lens, new


@dataclass
class StreamState:
    """All that a stream of utterances carries from one call to the next.

    Attributes:
        chunk_size: frames (50 Hz) that are encoded together.
        left_context_frames: frames of attention's left context; -1: all.
        num_mel_bins: width of the fbank.
        tensors: kept inputs, keys, values, ...; never changed in place, so that a
            state can be used again.
        fbank_lens: (B,) fbank frames received; None before the first call.
        ended: (B,) bool, utterances whose end was seen.
        convolved: frames that the embedding's convolutions have made.
        encoded: frames (50 Hz) that were encoded.
        finished: whether the whole stream has ended.
    """

    chunk_size: int
    left_context_frames: int
    num_mel_bins: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    fbank_lens: Tensor | None = None
    ended: Tensor | None = None
    convolved: int = 0
    encoded: int = 0
    finished: bool = False

    def received(self) -> Tensor:
        """``fbank_lens`` of a stream that has begun."""
        assert self.fbank_lens is not None
        return self.fbank_lens


def continue_stream(
    state: StreamState, fbank: Tensor, fbank_lens: Tensor, last: bool
) -> StreamState:
    """Check that a piece continues the stream, and return a new state that counts it.

    Args:
        state: the state before; it is not changed.
        fbank: (B, n, num_mel_bins).
        fbank_lens: (B,) frames of each.
        last: whether the stream ends here.

    Raises:
        InputError: the piece does not fit.
    """
    if state.finished:
        raise InputError("the stream has ended; begin another one with start_stream()")
    total, ended = state.fbank_lens, state.ended
    if total is None or ended is None:
        total = torch.zeros_like(fbank_lens)
        ended = total.bool()
    check_features(fbank, fbank_lens, state.num_mel_bins)
    least = MIN_FRAMES if last else 0
    check_piece(fbank_lens, fbank.size(1), total, ended, least, "frames")
    return replace(
        state,
        tensors=dict(state.tensors),
        fbank_lens=total + fbank_lens,
        ended=ended | (fbank_lens < fbank.size(1)),
        finished=last,
    )


def embed_piece(
    embed: ConvEmbed, fbank: Tensor, state: StreamState, exact: bool
) -> Tensor:
    """Embed the frames that a piece of fbank completes.

    What a later frame needs again is kept: fbank frames, and convolved frames for
    the ConvNeXt block, which looks 3 frames back and ahead.

    Args:
        embed: the embedding.
        fbank: (B, n, num_mel_bins).
        state: its tensors and counts are brought up to date.
        exact: whether padding is silenced between utterance and batch end.

    Returns:
        (B, so many frames, dim).
    """
    tensors = state.tensors
    if "fbank" in tensors:
        fbank = torch.cat([tensors["fbank"], fbank], dim=1)
    parts = [tensors["convolved"]] if "convolved" in tensors else []
    if fbank.size(1) >= MIN_FRAMES:
        new = embed.convolve(fbank)
        if exact:
            new = silence(new, embed.output_lengths(state.received()), state.convolved)
        if not parts:  # zeros before the first frame
            parts = [torch.zeros_like(new[:, :, :1]).repeat(1, 1, CONVNEXT_REACH, 1)]
        parts.append(new)
        state.convolved += new.size(2)
        fbank = fbank[:, 2 * new.size(2) :]
    tensors["fbank"] = fbank
    if state.finished:  # zeros behind the last one
        parts.append(torch.zeros_like(parts[0][:, :, :CONVNEXT_REACH]))
    nothing = fbank.new_zeros(fbank.size(0), 0, embed.out.out_features)
    if not parts:
        return nothing
    x = torch.cat(parts, dim=2)
    complete = x.size(2) - 2 * CONVNEXT_REACH
    tensors["convolved"] = x[:, :, max(0, complete) :]
    return embed.project(embed.convnext.inner(x)) if complete > 0 else nothing


def encode_chunks(
    encoder: Zipformer, x: Tensor, x_lens: Tensor, state: StreamState
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Encode all whole chunks there are, and at the end of the stream the rest.

    Args:
        encoder: a causal network.
        x: (B, n, C) further embedded frames.
        x_lens: (B,) frames of each utterance since the start of the stream.
        state: its tensors and counts are brought up to date.

    Returns:
        encoder_out (B, n', C), its lengths, hidden states (B, n', C), their lengths.
    """
    if "embedded" in state.tensors:
        x = torch.cat([state.tensors["embedded"], x], dim=1)
    pieces = []
    while x.size(1) >= state.chunk_size or (state.finished and x.size(1) > 0):
        n = min(x.size(1), state.chunk_size)
        piece_lens = (x_lens - state.encoded).clamp(0, n)
        piece = encoder.streaming_forward(
            x[:, :n],
            piece_lens,
            Past(state.tensors, "encoder."),
            first=state.encoded == 0,
            chunk=state.chunk_size,
            left_context=state.left_context_frames,
        )
        pieces.append((*piece, piece_lens))
        state.encoded += n
        x = x[:, n:]
    state.tensors["embedded"] = x
    if not pieces:
        nothing, none = x[:, :0], torch.zeros_like(x_lens)
        layers = sum(encoder.config.num_encoder_layers)
        return nothing, none, [nothing] * layers, none
    outs, out_lens, hidden, hidden_lens = zip(*pieces, strict=True)
    joined = [torch.cat(states, dim=1) for states in zip(*hidden, strict=True)]
    return torch.cat(outs, dim=1), sum(out_lens), joined, sum(hidden_lens)

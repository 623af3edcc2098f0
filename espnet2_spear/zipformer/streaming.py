"""Streaming: the causal network fed piece by piece, with explicit state."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from espnet2_spear.zipformer.checks import InputError, check_any, check_whole
from espnet2_spear.zipformer.embed import CONVNEXT_REACH, ConvEmbed, silence
from espnet2_spear.zipformer.encoder import Zipformer
from espnet2_spear.zipformer.frames import Past

MIN_FRAMES = 9  # fbank frames of one output frame


@dataclass
class StreamState:
    """All that a stream of utterances carries from one call to the next.

    Attributes:
        chunk_size: frames (50 Hz) that are encoded together.
        left_context_frames: frames of attention's left context; -1: all.
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
    tensors: dict[str, Tensor] = field(default_factory=dict)
    fbank_lens: Tensor | None = None
    ended: Tensor | None = None
    convolved: int = 0
    encoded: int = 0
    finished: bool = False


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
    b, n = fbank.shape[:2]
    check_any(fbank)
    check_whole(fbank_lens)
    if state.finished:
        raise InputError("the stream has ended; begin another one with start_stream()")
    total, ended = state.fbank_lens, state.ended
    if total is None or ended is None:
        total = torch.zeros(b, dtype=torch.long, device=fbank.device)
        ended = torch.zeros(b, dtype=torch.bool, device=fbank.device)
    if total.size(0) != b or fbank_lens.shape != (b,):
        raise InputError(
            f"a stream of {total.size(0)} utterances continues with fbank "
            f"{tuple(fbank.shape)} and lengths {tuple(fbank_lens.shape)}"
        )
    if bool(((fbank_lens < 0) | (fbank_lens > n)).any()):
        raise InputError(f"lengths {fbank_lens.tolist()} must be in 0..{n} frames")
    if bool((ended & (fbank_lens > 0)).any()):
        raise InputError(
            f"lengths {fbank_lens.tolist()}: utterances that had ended "
            f"({ended.nonzero().flatten().tolist()}) go on"
        )
    total = total + fbank_lens
    if last and int(total.min()) < MIN_FRAMES:
        raise InputError(
            f"stream of {total.tolist()} fbank frames: at least {MIN_FRAMES} are needed"
        )
    return replace(
        state,
        tensors=dict(state.tensors),
        fbank_lens=total,
        ended=ended | (fbank_lens < n),
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
            new = silence(new, embed.output_lengths(state.fbank_lens), state.convolved)
        if not parts:  # zeros before the first frame
            parts = [torch.zeros_like(new[:, :, :1]).repeat(1, 1, CONVNEXT_REACH, 1)]
        parts.append(new)
        state.convolved += new.size(2)
        fbank = fbank[:, 2 * new.size(2) :]
    tensors["fbank"] = fbank
    if state.finished:  # zeros behind the last one
        parts.append(torch.zeros_like(parts[0][:, :, :CONVNEXT_REACH]))
    x = torch.cat(parts, dim=2) if parts else None
    complete = 0 if x is None else x.size(2) - 2 * CONVNEXT_REACH
    if x is not None:
        tensors["convolved"] = x[:, :, max(0, complete) :]
    if complete <= 0:
        return fbank.new_zeros(fbank.size(0), 0, embed.out.out_features)
    return embed.project(embed.convnext.inner(x))


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
    hidden = [torch.cat(states, dim=1) for states in zip(*hidden, strict=True)]
    return torch.cat(outs, dim=1), sum(out_lens), hidden, sum(hidden_lens)

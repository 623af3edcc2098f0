"""The Zipformer: stacks of layers at several frame rates (arXiv 2310.11230, 3.1)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from espnet2_spear.zipformer.attention import encode_positions
from espnet2_spear.zipformer.config import ZipformerConfig
from espnet2_spear.zipformer.frames import Frames, Past
from espnet2_spear.zipformer.layer import ZipformerLayer
from espnet2_spear.zipformer.scaling import Bypass
from espnet2_spear.zipformer.schedule import BatchCount, Scheduled

FRAME_RATE = 50.0  # of the embedded frames
POS_DROPOUT = 0.15
FEATURE_MASK_PROB = 0.125
WARMUP_BATCHES = 4000.0
LAYER_SKIP = 0.5  # before a layer's part of the warm-up
LAYER_SKIP_END = 0.035  # after it, times the square root of the stack's factor


def layer_skip(stack: int, layer: int, config: ZipformerConfig) -> Scheduled:
    """Schedule of skipping a layer: deeper stacks settle later in the warm-up.

    Args:
        stack: index of the stack.
        layer: index of the layer within it.
        config: sizes.
    """
    part = WARMUP_BATCHES / (len(config.num_encoder_layers) + 1)
    step = part / config.num_encoder_layers[stack]
    begin = part * (stack + 1) + step * layer
    end = LAYER_SKIP_END * config.downsampling_factor[stack] ** 0.5
    return ((begin, LAYER_SKIP), (begin + step, end))


class Downsample(nn.Module):
    """Weighted mean of every ``factor`` frames, one learned weight per position.

    Args:
        factor: frames that become one.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.bias = nn.Parameter(torch.zeros(factor))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, ceil(T / factor), C); the last frame is repeated."""
        b, t, c = x.shape
        groups = (t + self.factor - 1) // self.factor
        missing = groups * self.factor - t
        if torch.compiler.is_compiling():  # a graph must hold for any length
            index = torch.arange(groups * self.factor, device=x.device)
            x = x.index_select(1, index.clamp(max=t - 1))
        elif missing:
            x = torch.cat([x, x[:, -1:].expand(b, missing, c)], dim=1)
        weights = self.bias.softmax(dim=0).to(x.dtype)
        x = x.reshape(b, groups, self.factor, c)
        # Not a product of matrices, which autocast would round to 16 bits.
        return (x * weights[:, None]).sum(dim=2)


class ZipformerStack(nn.Module):
    """Layers that share a frame rate.

    Args:
        config: sizes.
        index: which stack.
        count: given, the regularisers of training are on.
    """

    def __init__(
        self,
        config: ZipformerConfig,
        index: int,
        count: BatchCount | None = None,
    ) -> None:
        super().__init__()
        self.pos_dim = config.pos_dim
        self.count = count
        self.checkpointing = config.activation_checkpointing
        self.layers = nn.ModuleList(
            ZipformerLayer(config, index, count, layer_skip(index, layer, config))
            for layer in range(config.num_encoder_layers[index])
        )

    def forward(self, x: Tensor, frames: Frames) -> tuple[Tensor, list[Tensor]]:
        """Map (B, T, C); return the output and the output of every layer.

        In training the two differ by the feature mask.
        """
        past, key_padding = frames.past, frames.padding
        if past is not None:
            key_padding = past.extend("padding", key_padding, frames.left)
        left = key_padding.size(1) - x.size(1)
        pos = encode_positions(x.size(1), self.pos_dim, x.device, left).to(x.dtype)
        if self.training and self.count is not None:
            pos = nn.functional.dropout(pos, POS_DROPOUT)
        frames = frames.with_keys(pos, key_padding)
        if frames.feature_mask is not None:
            x = x * frames.feature_mask
        hidden_states = []
        again = self.checkpointing and self.training and torch.is_grad_enabled()
        for i, layer in enumerate(self.layers):
            if again:
                # Random states are restored for the second computation, so that it
                # drops and skips the same.
                x = checkpoint(
                    layer, x, frames, use_reentrant=False, context_fn=_same_coins
                )
            else:
                x = layer(x, frames, None if past is None else past.child(str(i)))
            hidden_states.append(x)
            if frames.feature_mask is not None:
                x = x * frames.feature_mask
        return x, hidden_states


class DownsampledStack(nn.Module):
    """A stack that works at a lower frame rate.

    Args:
        config: sizes.
        index: which stack.
        count: given, the regularisers of training are on.
    """

    def __init__(
        self,
        config: ZipformerConfig,
        index: int,
        count: BatchCount | None,
    ) -> None:
        super().__init__()
        self.factor = config.downsampling_factor[index]
        self.downsample = Downsample(self.factor)
        self.encoder = ZipformerStack(config, index, count)
        self.out_combiner = Bypass(config.encoder_dim[index], count)

    def forward(self, x: Tensor, frames: Frames) -> tuple[Tensor, list[Tensor]]:
        """Map (B, T, C) to (B, T, C); hidden states are repeated up to T frames."""
        low = self.downsample(frames.hold_last(x))
        low, hidden_states = self.encoder(low, frames.at(self.factor))
        hidden_states = [self._upsample(h, x) for h in hidden_states]
        masked = frames.feature_mask is not None
        up = self._upsample(low, x) if masked else hidden_states[-1]
        return self.out_combiner(x, up), hidden_states

    def _upsample(self, low: Tensor, like: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # a graph must hold for any length
            index = torch.arange(like.size(1), device=low.device)
            return low.index_select(1, index // self.factor)
        return low.repeat_interleave(self.factor, dim=1)[:, : like.size(1)]


class Zipformer(nn.Module):
    """All stacks, from 50 Hz frames to the encoder output.

    Args:
        config: sizes.

    Attributes:
        count: batches trained on, if ``config.regularize``; else None.
    """

    def __init__(self, config: ZipformerConfig) -> None:
        super().__init__()
        self.config = config
        self.count = None
        if config.regularize:
            self.count = BatchCount(
                config.regularize_batch_seconds, config.regularize_start
            )
        self.encoders = nn.ModuleList(
            (ZipformerStack if factor == 1 else DownsampledStack)(config, i, self.count)
            for i, factor in enumerate(config.downsampling_factor)
        )
        self.downsample_output = (
            Downsample(config.output_downsampling_factor)
            if config.output_downsampling_factor > 1
            else None
        )

    def forward(
        self, x: Tensor, lengths: Tensor, with_hidden: bool = True
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Encode.

        Training of a causal network draws the chunk size and the left context from
        ``train_chunk_size`` and ``train_left_context_frames``.

        Args:
            x: (B, T, C) embedded frames, 50 Hz.
            lengths: (B,) frames of each.
            with_hidden: whether hidden states are wanted, which take memory.

        Returns:
            encoder_out (B, T', C), its lengths (B,), and one hidden state (B, T, C)
            per layer at 50 Hz, taken before the stack's out_combiner; none unless
            wanted.
        """
        if self.training and torch.is_grad_enabled() and self.count is not None:
            self.count.advance(x.size(0) * x.size(1) / FRAME_RATE)
        chunk, left_chunks = self._draw_chunk()
        frames = Frames(
            _padding(x, lengths),
            exact=self.config.padding == "exact",
            causal=self.config.causal,
            chunk=chunk,
            left_chunks=left_chunks,
        )
        masks = self._draw_feature_masks(x)
        return self._encode(x, lengths, frames, with_hidden, masks)

    def streaming_forward(
        self,
        x: Tensor,
        lengths: Tensor,
        past: Past,
        first: bool | Tensor,
        chunk: int,
        left_context: int,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Encode one chunk, given what was kept of the chunks before it.

        Args:
            x: (B, n, C) embedded frames, 50 Hz; n is ``chunk``, at the very end of a
                stream also less.
            lengths: (B,) how many of the n belong to each utterance.
            past: kept tensors, replaced by those of the next step.
            first: whether this is the first chunk; (B,), if of some utterances.
            chunk: frames of a chunk.
            left_context: frames of left context, -1 for all.

        Returns:
            as ``forward``, of these n frames.
        """
        frames = Frames(
            _padding(x, lengths),
            exact=self.config.padding == "exact",
            causal=True,
            chunk=chunk,
            left_chunks=_left_chunks(left_context, chunk),
            first=first,
            past=past,
        )
        return self._encode(x, lengths, frames)

    def _encode(
        self,
        x: Tensor,
        lengths: Tensor,
        frames: Frames,
        with_hidden: bool = True,
        masks: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        hidden_states: list[Tensor] = []
        for i, stack in enumerate(self.encoders):
            mask = masks[i] if masks else None
            x, states = stack(x, replace(frames.child(str(i)), feature_mask=mask))
            if with_hidden:
                hidden_states.extend(states)
            del states
        if self.downsample_output is not None:
            x = self.downsample_output(frames.hold_last(x))
            lengths = (lengths + 1) // 2
        return x, lengths, hidden_states

    def _draw_chunk(self) -> tuple[int, int]:
        """Return chunk size in frames and left context in chunks; -1: no limit."""
        config = self.config
        if not config.causal:
            return -1, -1
        chunk, left = config.chunk_size, config.left_context_frames
        if self.training:
            chunk = _draw(config.train_chunk_size)
            left = _draw(config.train_left_context_frames)
        return chunk, _left_chunks(left, chunk)

    def _draw_feature_masks(self, x: Tensor) -> list[Tensor]:
        """Return (B, 1, C) of 0 and 1 for each stack in training.

        Channels from a stack's unmasked dimension on are dropped per sequence by one
        draw, their upper half by a second one as well; all stacks have the same draws.
        """
        if not self.training or self.count is None:
            return []
        keep = torch.rand(2, x.size(0), 1, 1, device=x.device) >= FEATURE_MASK_PROB
        first, second = keep[0].to(x.dtype), keep.all(dim=0).to(x.dtype)
        masks = []
        sizes = self.config.encoder_dim, self.config.encoder_unmasked_dim
        for dim, kept in zip(*sizes, strict=True):
            middle = (dim - kept) // 2
            parts = [(torch.ones_like(first), kept), (first, middle)]
            parts += [(second, dim - kept - middle)]
            wide = [part.expand(-1, 1, width) for part, width in parts]
            masks.append(torch.cat(wide, dim=-1))
        return masks


def _padding(x: Tensor, lengths: Tensor) -> Tensor:
    """(B, T) bool, True behind the end of each utterance of x (B, T, C)."""
    return torch.arange(x.size(1), device=x.device) >= lengths[:, None].to(x.device)


def _left_chunks(left_context: int, chunk: int) -> int:
    """Whole chunks of left context: at least one; -1 (all) without chunks."""
    if left_context < 0 or chunk < 0:
        return -1
    return max(1, left_context // chunk)


def _draw(choices: tuple[int, ...]) -> int:
    return choices[random.randrange(len(choices))]


@contextmanager
def _coins_from(state: tuple) -> Iterator[None]:
    now = random.getstate()
    random.setstate(state)
    try:
        yield
    finally:
        random.setstate(now)


def _same_coins() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of the two computations of a checkpointed layer.

    PyTorch restores its own generators for the second one, Python's not.
    """
    return nullcontext(), _coins_from(random.getstate())

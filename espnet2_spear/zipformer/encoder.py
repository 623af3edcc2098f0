"""Zipformer: stacks of layers at several frame rates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from espnet2_spear.zipformer.attention import RelPositionalEncoding
from espnet2_spear.zipformer.config import ZipformerConfig
from espnet2_spear.zipformer.layer import ZipformerLayer
from espnet2_spear.zipformer.scaling import Bypass


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
        missing = -t % self.factor
        if missing:
            x = torch.cat([x, x[:, -1:].expand(b, missing, c)], dim=1)
        weights = self.bias.softmax(dim=0).to(x.dtype)
        x = x.unflatten(1, (-1, self.factor))
        return torch.einsum("btfc,f->btc", x, weights)


class ZipformerStack(nn.Module):
    """Layers that share a frame rate.

    Args:
        config: sizes.
        index: which stack.
        pos: positional encoding, shared by all stacks.
    """

    def __init__(
        self, config: ZipformerConfig, index: int, pos: RelPositionalEncoding
    ) -> None:
        super().__init__()
        # In a tuple so that the shared encoding is not registered once per stack.
        self._pos = (pos,)
        self.layers = nn.ModuleList(
            ZipformerLayer(
                dim=config.encoder_dim[index],
                num_heads=config.num_heads[index],
                query_head_dim=config.query_head_dim,
                pos_head_dim=config.pos_head_dim,
                value_head_dim=config.value_head_dim,
                pos_dim=config.pos_dim,
                feedforward_dim=config.feedforward_dim[index],
                kernel=config.cnn_module_kernel[index],
            )
            for _ in range(config.num_encoder_layers[index])
        )

    def forward(self, x: Tensor, padding: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Map (B, T, C); return the output and the output of every layer."""
        pos = self._pos[0](x.size(1), x.device).to(x.dtype)
        hidden_states = []
        for layer in self.layers:
            x = layer(x, pos, padding)
            hidden_states.append(x)
        return x, hidden_states


class DownsampledStack(nn.Module):
    """A stack that works at a lower frame rate.

    Args:
        config: sizes.
        index: which stack.
        pos: positional encoding, shared by all stacks.
    """

    def __init__(
        self, config: ZipformerConfig, index: int, pos: RelPositionalEncoding
    ) -> None:
        super().__init__()
        self.factor = config.downsampling_factor[index]
        self.downsample = Downsample(self.factor)
        self.encoder = ZipformerStack(config, index, pos)
        self.out_combiner = Bypass(config.encoder_dim[index])

    def forward(self, x: Tensor, padding: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Map (B, T, C) to (B, T, C); hidden states are repeated up to T frames."""
        t = x.size(1)
        low = None if padding is None else padding[:, :: self.factor]
        _, hidden_states = self.encoder(self.downsample(x), low)
        hidden_states = [
            h.repeat_interleave(self.factor, dim=1)[:, :t] for h in hidden_states
        ]
        return self.out_combiner(x, hidden_states[-1]), hidden_states


class Zipformer(nn.Module):
    """All stacks, from 50 Hz frames to the encoder output.

    Args:
        config: sizes.
    """

    def __init__(self, config: ZipformerConfig) -> None:
        super().__init__()
        pos = RelPositionalEncoding(config.pos_dim)
        self.encoders = nn.ModuleList(
            (ZipformerStack if factor == 1 else DownsampledStack)(config, i, pos)
            for i, factor in enumerate(config.downsampling_factor)
        )
        self.downsample_output = (
            Downsample(config.output_downsampling_factor)
            if config.output_downsampling_factor > 1
            else None
        )

    def forward(
        self, x: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Encode.

        Args:
            x: (B, T, C) embedded frames, 50 Hz.
            lengths: (B,) frames of each.

        Returns:
            encoder_out (B, T', C), its lengths (B,), and one hidden state (B, T, C)
            per layer at 50 Hz, taken before the stack's out_combiner.
        """
        padding = torch.arange(x.size(1), device=x.device)[None] >= lengths[:, None]
        hidden_states: list[Tensor] = []
        for stack in self.encoders:
            x, states = stack(x, padding)
            hidden_states.extend(states)
        if self.downsample_output is not None:
            x = self.downsample_output(x)
            lengths = (lengths + 1) // 2
        return x, lengths, hidden_states

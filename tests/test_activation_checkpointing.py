"""Activation checkpointing: the same training, with less kept for it."""

import contextlib
import random
from dataclasses import replace

import pytest
import torch
from test_zipformer_exact import NARROW

from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import ConfigError, ZipformerConfig
from espnet2_spear.zipformer.regularizers import Whiten

FBANK_LENGTHS = torch.tensor([120, 90])


def train(config: ZipformerConfig, bf16: bool) -> tuple[SpearEncoder, list, int]:
    """Four steps; the student, all gradients and the bytes kept for the last step."""
    torch.manual_seed(0)
    random.seed(0)
    model = SpearEncoder(config).train()
    gradients, kept = [], {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    for _ in range(4):
        model.zero_grad()
        kept.clear()
        fbank = torch.randn(2, 120, config.num_mel_bins) * 3 - 8
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
            torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext(),
        ):
            out = model.encode(fbank, FBANK_LENGTHS).encoder_out
        out.float().square().mean().backward()
        gradients += [p.grad for p in model.parameters() if p.grad is not None]
    return model, gradients, sum(kept.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("regularize", [False, True])
def test_gradients_are_the_same_bit_for_bit(regularize: bool, bf16: bool) -> None:
    """Random draws of both computations agree, and the batch count moves once."""
    # Counts that rise fast, so that schedules change from step to step.
    config = replace(
        NARROW,
        num_encoder_layers=(2, 2, 2, 2),  # beside them the embedding weighs little
        causal=regularize,  # draws chunks, too
        regularize=regularize,
        regularize_batch_seconds=0.01,
    )
    plain, expected, plain_bytes = train(config, bf16)
    model, got, kept_bytes = train(replace(config, activation_checkpointing=True), bf16)
    assert len(got) == len(expected) > 4 * 40
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    assert kept_bytes < 0.6 * plain_bytes
    if regularize:
        assert model.encoder.count.value == plain.encoder.count.value > 100
        probs = [
            [m.prob for m in x.modules() if isinstance(m, Whiten)]
            for x in (model, plain)
        ]
        assert probs[0] == probs[1] and 0.025 in probs[0]


def test_option_is_checked() -> None:
    assert ZipformerConfig.from_dict({"activation_checkpointing": 1}) == (
        ZipformerConfig(activation_checkpointing=True)
    )
    with pytest.raises(ConfigError, match="activation_checkpointing"):
        ZipformerConfig.from_dict({"activation_checkpointing": "layers"})

"""How far other number formats and devices are from float32 on a CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_zipformer import GOLDEN_CONFIG
from test_zipformer_exact import build


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, relative to the values."""
    diff = got.float().cpu() - expected
    return (diff.square().mean() / expected.square().mean()).sqrt().item()


# Stated in docs/zipformer.md: root mean square error of bfloat16 autocast, relative to
# the values' own.
EMBED_BOUND, LAYER_BOUND, CAUSAL_BOUND = 0.015, 0.03, 0.04


@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16_autocast_against_the_reference(causal: bool, data_dir: Path) -> None:
    """Embedding, every layer and the output, by the reference's float32 outputs."""
    inputs = np.load(data_dir / "zipformer.npz")
    ref = np.load(data_dir / "zipformer_causal.npz") if causal else inputs
    step = int(ref["step"])
    model = build(GOLDEN_CONFIG, causal=causal)
    x, lens = torch.tensor(inputs["x"]).float(), torch.tensor(inputs["x_lens"])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        embed = model.encoder_embed(x)[:, ::step]
        out = model.encode(x, lens)
    assert 0 < relative_error(embed, torch.tensor(inputs["embed"])) < EMBED_BOUND
    states = [*enumerate(out.hidden_states)]
    pairs = [(h, ref[f"hidden{i}"]) for i, h in states] + [
        (out.encoder_out, ref["out"])
    ]
    bound = CAUSAL_BOUND if causal else LAYER_BOUND
    for got, expected in pairs:
        error = relative_error(got[:, ::step], torch.tensor(expected).float())
        assert 0 < error < bound


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("causal", [False, True])
def test_gpu(causal: bool) -> None:
    """Float32 on a GPU agrees to 1e-4; bfloat16 autocast within the stated bound."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = build(GOLDEN_CONFIG, causal=causal)
    torch.manual_seed(0)
    speech, lens = torch.randn(2, 24000) * 0.1, torch.tensor([24000, 20000])
    with torch.no_grad():
        expected = model(speech, lens).encoder_out
        model.cuda()
        got = model(speech.cuda(), lens.cuda()).encoder_out
        torch.testing.assert_close(got.cpu(), expected, atol=1e-4, rtol=1e-4)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            got = model(speech.cuda(), lens.cuda()).encoder_out
    bound = CAUSAL_BOUND if causal else LAYER_BOUND
    assert relative_error(got, expected) < bound

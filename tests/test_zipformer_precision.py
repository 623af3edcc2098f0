"""How far other number formats and devices are from float32 on a CPU."""

import pytest
import torch
from test_zipformer import GOLDEN_CONFIG
from test_zipformer_exact import NARROW, build


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, relative to the values."""
    diff = got.float().cpu() - expected
    return (diff.square().mean() / expected.square().mean()).sqrt().item()


@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16_autocast(causal: bool) -> None:
    """Stated bound: 3 % of the outputs' size, in every layer."""
    model = build(GOLDEN_CONFIG, causal=causal)
    torch.manual_seed(0)
    fbank, lens = torch.randn(2, 150, 128) * 3 - 8, torch.tensor([150, 120])
    with torch.no_grad():
        expected = model.encode(fbank, lens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model.encode(fbank, lens)
    pairs = zip(got.hidden_states, expected.hidden_states, strict=True)
    errors = [relative_error(a, b) for a, b in pairs]
    assert 0 < max(errors) < 0.03


def test_bfloat16_training_with_regularisers() -> None:
    model = build(NARROW, regularize=True, causal=True).train()
    for _ in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model.encode(torch.randn(2, 90, 128), torch.tensor([90, 60]))
        out.encoder_out.float().square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(torch.isfinite(g).all() for g in grads)


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
    assert relative_error(got, expected) < 0.03

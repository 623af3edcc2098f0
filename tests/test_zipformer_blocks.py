"""The short ways of a CPU give the numbers and gradients of the plain operations."""

import pytest
import torch
from test_zipformer_exact import NARROW, build

from espnet2_spear.zipformer import attend as attend_module
from espnet2_spear.zipformer import blocked_attention, linear, products, scores
from espnet2_spear.zipformer.attend import Attention, attend
from espnet2_spear.zipformer.blocked_attention import BlockedAttention
from espnet2_spear.zipformer.embed import ConvEmbed
from espnet2_spear.zipformer.linear import apply_linear, pointwise_pair, swoosh_linear
from espnet2_spear.zipformer.regularizers import Balancer
from espnet2_spear.zipformer.scaling import SWOOSH_L, BiasNorm, swoosh_l
from espnet2_spear.zipformer.schedule import BatchCount
from espnet2_spear.zipformer.scores import Inputs

needs_onednn = pytest.mark.skipif(
    not products.ONEDNN, reason="needs AVX-512 and oneDNN"
)


def gradients(out: torch.Tensor, inputs: list) -> list[torch.Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad((out * weight).sum(), inputs)]


def assert_same(got: list, expected: list) -> None:
    for a, b in zip(got, expected, strict=True):
        # Sums of many terms: rounding follows the largest of them.
        atol = max(2e-5, 2e-6 * float(b.detach().abs().max()))
        torch.testing.assert_close(a, b, atol=atol, rtol=2e-4)


@pytest.mark.parametrize("way", ["all weights", "blocks", "blocks, no oneDNN"])
@pytest.mark.parametrize("penalize", [False, True])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("left, chunk", [(0, None), (5, None), (0, 5), (0, 2)])
def test_attention_in_blocks(
    monkeypatch: pytest.MonkeyPatch,
    left: int,
    chunk: int | None,
    positions: bool,
    penalize: bool,
    way: str,
) -> None:
    """Three uses of weights, one of them of the first head only."""
    torch.manual_seed(0)
    b, h, t, s = 2, 3, 21, 21 + left
    shapes = [(b, h, t, 4), (b, h, s, 4), (b, h, t, 2), (h, 2, t + s - 1)]
    shapes += [(b, h, s, 5), (b, 1, s, 7), (b, h, s, 5)]
    tensors = [(torch.randn(shape) * 3).requires_grad_() for shape in shapes]
    padding = torch.arange(s) >= torch.tensor([[s], [s - 4]])
    seen = None
    if chunk:  # some queries in the padding see nothing but padding
        begin = torch.arange(t) // chunk * chunk
        seen = torch.stack([(begin - chunk).clamp(min=0), begin + chunk], dim=1)
    monkeypatch.setattr(scores, "BLOCK", 1)  # 8 queries, the least
    monkeypatch.setattr(blocked_attention, "CPU_BLOCK", 1)
    monkeypatch.setattr(scores, "SCORE_LIMIT", 10.0)
    monkeypatch.setattr(scores, "SCORE_PENALTY", 0.01)
    used = tensors if positions else [*tensors[:2], *tensors[4:]]

    def run(kind: type) -> list[torch.Tensor]:
        p, r = tensors[2:4] if positions else (None, None)
        attention = attend(Inputs(*tensors[:2], p, r, padding, seen), penalize)
        assert isinstance(attention, kind)
        outs = [attention.apply(v).sum(dim=-1) for v in tensors[4:]]
        return gradients(outs[0] + outs[1] * outs[2], used)

    with monkeypatch.context() as patch:
        kind = Attention if way == "all weights" else BlockedAttention
        if kind is BlockedAttention:
            patch.setattr(attend_module, "MAX_TRAINED_WEIGHTS", 0)
        if way == "blocks, no oneDNN":
            patch.setattr(products, "ONEDNN", False)
        got = run(kind)
    monkeypatch.setattr(attend_module, "_on_cpu", lambda x: False)
    assert_same(got, run(Attention))


def test_attention_in_blocks_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 within, but dtypes are those of the tensors that come in."""
    torch.manual_seed(0)
    shapes = [(2, 3, 21, 4), (2, 3, 21, 4), (2, 3, 21, 2), (3, 2, 41), (2, 3, 21, 5)]
    tensors = [torch.randn(x).bfloat16().requires_grad_() for x in shapes]
    padding = torch.arange(21) >= torch.tensor([[21], [17]])

    def run() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            attention = attend(Inputs(*tensors[:4], padding, None), False)
            out = attention.apply(tensors[4])
        assert out.dtype == torch.bfloat16
        return gradients(out, tensors)

    expected = run()
    monkeypatch.setattr(attend_module, "MAX_TRAINED_WEIGHTS", 0)
    for a, b in zip(run(), expected, strict=True):
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)


def test_long_utterances_are_attended_to_in_blocks() -> None:
    """No weights as a whole are among what is kept, and none are made without need."""
    frames = 400
    shapes = [(1, 1, frames, 4), (1, 1, frames, 4)]
    q, k = (torch.randn(shape, requires_grad=True) for shape in shapes)
    padding = torch.zeros(1, frames, dtype=torch.bool)
    assert isinstance(
        attend(Inputs(q, k, None, None, padding, None), False), BlockedAttention
    )
    meta = Inputs(q.to("meta"), k.to("meta"), None, None, padding.to("meta"), None)
    assert isinstance(attend(meta, False), Attention)  # as on a GPU


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", ["compatible", "exact"])
def test_long_audio_is_encoded_in_blocks(
    monkeypatch: pytest.MonkeyPatch, causal: bool, padding: str
) -> None:
    """No weights are kept and the embedding is cut, yet the outputs are the same."""
    model = build(NARROW, causal=causal, chunk_size=16, padding=padding)
    torch.manual_seed(0)
    fbank, lens = torch.randn(2, 700, 128) * 3 - 8, torch.tensor([700, 500])
    with torch.no_grad():
        whole = model.encode(fbank, lens)
        monkeypatch.setattr(attend_module, "MAX_WEIGHTS", 0)
        monkeypatch.setattr(blocked_attention, "CPU_BLOCK", 2**10)
        monkeypatch.setattr("espnet2_spear.zipformer.embed.BLOCK_FRAMES", 1)
        pieces = model.encode(fbank, lens)
    for a, b in zip(pieces.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


@needs_onednn
def test_linear_maps() -> None:
    torch.manual_seed(0)
    first, second = torch.nn.Linear(6, 9), torch.nn.Linear(9, 4)
    x = torch.randn(3, 8, 6, requires_grad=True)
    keep = torch.rand(3, 1, 9) * 2
    inputs = [x, *first.parameters(), *second.parameters()]
    assert linear.on_cpu(x, first)
    got = swoosh_linear(second, apply_linear(first, x), SWOOSH_L, keep)
    expected = second(swoosh_l(first(x)) * keep)
    assert_same(gradients(got, inputs), gradients(expected, inputs))
    with torch.no_grad():
        got = swoosh_linear(second, apply_linear(first, x), SWOOSH_L, keep)
    torch.testing.assert_close(got, expected)


@needs_onednn
@pytest.mark.parametrize("batch", [1, 2])
def test_no_operation_takes_the_reference_code_of_onednn(
    capfd: pytest.CaptureFixture, batch: int
) -> None:
    """Which is what oneDNN has for operands in an unusual layout; it is slow."""
    student = build(NARROW, regularize=True).train()
    speech = torch.randn(batch, 48000)
    verbose = torch.backends.mkldnn.verbose
    with verbose(torch.backends.mkldnn.VERBOSE_ON):
        out = student(speech, torch.full((batch,), 48000)).encoder_out
        out.square().mean().backward()
    printed = capfd.readouterr().out
    used = [line for line in printed.splitlines() if ",exec," in line]
    assert any("inner_product" in line for line in used)
    assert [line for line in used if ",ref" in line] == []


def test_layers_that_were_replaced_or_watched_are_called() -> None:
    """LoRA, quantization and hooks work on the layer itself."""

    class Twice(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    x, layer = torch.randn(2, 3, 4), Twice(4, 5)
    assert torch.equal(apply_linear(layer, x), layer(x))
    assert torch.equal(swoosh_linear(layer, x, SWOOSH_L), layer(swoosh_l(x)))
    plain = torch.nn.Linear(4, 5)
    plain.register_forward_hook(lambda module, args, out: out + 1)
    assert torch.equal(apply_linear(plain, x), plain(x))


@needs_onednn
@pytest.mark.parametrize("balanced", [False, True])
def test_pointwise_pair(monkeypatch: pytest.MonkeyPatch, balanced: bool) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(linear, "ROWS", 50)
    first, second = torch.nn.Conv2d(4, 12, 1), torch.nn.Conv2d(12, 4, 1)
    x = torch.randn(2, 4, 9, 7).to(memory_format=torch.channels_last).requires_grad_()
    balancer = Balancer(
        BatchCount(), min_positive=0.6, max_abs=0.5, prob=1.0, channel_dim=1
    )
    middle = balancer if balanced else torch.nn.Identity()
    inputs = [x, *first.parameters(), *second.parameters()]
    got = pointwise_pair(first, second, x, balancer.draw() if balanced else None)
    expected = second(swoosh_l(middle(first(x))))
    assert_same(gradients(got, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("short", [False, True])
def test_embedding_gradients(monkeypatch: pytest.MonkeyPatch, short: bool) -> None:
    """As in float64, where every operation is PyTorch's own."""
    torch.manual_seed(0)
    monkeypatch.setattr(products, "ONEDNN", products.ONEDNN and short)
    embed, x = ConvEmbed(24, 8, (2, 4, 8)), torch.randn(2, 31, 24)
    got = gradients(embed(x), list(embed.parameters()))
    embed.double()
    expected = gradients(embed(x.double()), list(embed.parameters()))
    assert_same(got, [y.float() for y in expected])


def test_bias_norm_gradient() -> None:
    norm = BiasNorm(5).double()
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)

    def call(x, bias, log_scale):
        rms = (x - bias).square().mean(dim=-1, keepdim=True).rsqrt()
        return x * rms * log_scale.exp()

    inputs = [x, norm.bias, norm.log_scale]
    assert_same(gradients(norm(x), inputs), gradients(call(*inputs), inputs))

"""Blocks, and a CPU's versions, give the numbers and gradients of plain operations."""

from collections.abc import Iterator
from importlib import import_module

import pytest
import torch
from test_zipformer_exact import NARROW, build

from espnet2_spear import torch_private
from espnet2_spear.zipformer import conv_embed, cpu, scores
from espnet2_spear.zipformer.conv_embed import ConvEmbed, ConvNeXt, pointwise
from espnet2_spear.zipformer.cpu import use_cpu_versions
from espnet2_spear.zipformer.fusion import cpu_versions
from espnet2_spear.zipformer.scaling import (
    SWOOSH_L,
    BiasNorm,
    linear,
    swoosh_l,
    swoosh_linear,
)
from espnet2_spear.zipformer.schedule import BatchCount
from espnet2_spear.zipformer.scores import Attention, Inputs

# oneDNN's products work on any CPU, slower where they are not used by default.
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="needs oneDNN"
)


@pytest.fixture(autouse=True)
def _all_versions() -> Iterator[None]:
    use_cpu_versions()
    yield
    use_cpu_versions()


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products by oneDNN, whatever the CPU."""
    monkeypatch.setattr(cpu, "ONEDNN", True)


def gradients(out: torch.Tensor, inputs: list) -> list[torch.Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad((out * weight).sum(), inputs)]


def assert_same(got: list, expected: list) -> None:
    for a, b in zip(got, expected, strict=True):
        # Sums of many terms: rounding follows the largest of them.
        atol = max(2e-5, 2e-6 * float(b.detach().abs().max()))
        torch.testing.assert_close(a, b, atol=atol, rtol=2e-4)


WAYS = ["plain blocks", "CPU's blocks", pytest.param("oneDNN", marks=needs_onednn)]


def choose_way(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Blocks of 8 queries, the least."""
    use_cpu_versions(way != "plain blocks")
    monkeypatch.setattr(cpu, "ONEDNN", way == "oneDNN")
    monkeypatch.setattr(cpu, "MAX_HEAD_WEIGHTS", 0)
    monkeypatch.setattr(cpu, "HEAD_WEIGHTS", 1)
    monkeypatch.setattr(scores, "MAX_WEIGHTS", 0)
    monkeypatch.setattr(scores, "BLOCK_WEIGHTS", 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("penalty", [0.0, 0.01])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("left, chunk", [(0, None), (5, None), (0, 5), (0, 2)])
def test_attention_in_blocks(
    monkeypatch: pytest.MonkeyPatch,
    left: int,
    chunk: int | None,
    positions: bool,
    penalty: float,
    way: str,
) -> None:
    """Three uses of weights, one of them of the first head only."""
    torch.manual_seed(0)
    b, h, t, s = 2, 3, 21, 21 + left
    shapes = [(b, h, t, 4), (b, h, s, 4), (b, h, t, 2), (h, 2, t + s - 1)]
    shapes += [(b, 1, s, 7), (b, h, s, 5), (b, h, s, 5)]
    tensors = [(torch.randn(shape) * 3).requires_grad_() for shape in shapes]
    padding = torch.arange(s) >= torch.tensor([[s], [s - 4]])
    seen = None
    if chunk:  # some queries in the padding see nothing but padding
        begin = torch.arange(t) // chunk * chunk
        seen = torch.stack([(begin - chunk).clamp(min=0), begin + chunk], dim=1)
    for module in (scores, cpu):
        monkeypatch.setattr(module, "SCORE_LIMIT", 10.0)
    used = tensors if positions else [*tensors[:2], *tensors[4:]]

    def run(whole: bool) -> list[torch.Tensor]:
        p, r = tensors[2:4] if positions else (None, None)
        attention = Attention(Inputs(*tensors[:2], p, r, padding, seen), penalty)
        assert (attention.weights is not None) == whole
        outs = [attention.apply(v).sum(dim=-1) for v in tensors[4:]]
        return gradients(outs[0] + outs[1] * outs[2], used)

    expected = run(whole=True)
    choose_way(monkeypatch, way)
    assert_same(run(whole=False), expected)


def test_attention_in_blocks_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shapes = [(2, 3, 21, 4), (2, 3, 21, 4), (2, 3, 21, 2), (3, 2, 41), (2, 3, 21, 5)]
    tensors = [torch.randn(x).bfloat16().requires_grad_() for x in shapes]
    padding = torch.arange(21) >= torch.tensor([[21], [17]])

    def run() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            out = Attention(Inputs(*tensors[:4], padding, None)).apply(tensors[4])
        assert out.dtype == torch.bfloat16
        return gradients(out, tensors)

    expected = run()
    choose_way(monkeypatch, "CPU's blocks")  # which are not for bfloat16
    for a, b in zip(run(), expected, strict=True):
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    "device, utterances, frames, blocks",
    [("cpu", 1, 400, True), ("cpu", 50, 300, False)]
    + [("meta", 1, 400, False), ("meta", 500, 2000, False), ("meta", 1, 2100, True)],
)
def test_which_utterances_are_attended_to_in_blocks(
    device: str, utterances: int, frames: int, blocks: bool
) -> None:
    """Their own length decides, not the batch's size; on a GPU (meta) longer ones."""
    q = torch.empty(utterances, 8, frames, 4, device=device)
    assert scores.in_blocks(q, q) == blocks


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", ["compatible", "exact"])
def test_long_audio_is_encoded_in_blocks(
    monkeypatch: pytest.MonkeyPatch, causal: bool, padding: str, way: str
) -> None:
    """No weights are kept and the embedding is cut, yet the outputs are the same."""
    model = build(NARROW, causal=causal, chunk_size=16, padding=padding)
    torch.manual_seed(0)
    fbank, lens = torch.randn(2, 700, 128) * 3 - 8, torch.tensor([700, 500])
    with torch.no_grad():
        whole = model.encode(fbank, lens)
        choose_way(monkeypatch, way)
        monkeypatch.setattr(cpu, "HEAD_WEIGHTS", 2**10)
        monkeypatch.setattr(scores, "BLOCK_WEIGHTS", 2**12)
        monkeypatch.setitem(conv_embed.BLOCK_FRAMES, "cpu", 1)
        pieces = model.encode(fbank, lens)
    for a, b in zip(pieces.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "have",
    [
        pytest.param({"ONEDNN": True}, marks=needs_onednn),
        # On any CPU, without the private function: linear maps by whichever library.
        {"ONEDNN": True, "onednn_linear": torch_private.plain_linear},
        {"ONEDNN": False},
    ],
)
@pytest.mark.parametrize("changes", [{}, {"causal": True, "padding": "exact"}])
def test_a_student_with_and_without_the_versions(
    monkeypatch: pytest.MonkeyPatch, changes: dict, have: dict
) -> None:
    for name, value in have.items():
        monkeypatch.setattr(cpu, name, value)
    monkeypatch.setattr(cpu, "MAX_HEAD_WEIGHTS", 400)
    model = build(NARROW, **changes)
    torch.manual_seed(0)
    speech, lengths = torch.randn(2, 16000) * 0.1, torch.tensor([16000, 9000])
    used = [p for n, p in model.named_parameters() if "mask_emb" not in n]
    used = [p for p in used if p.requires_grad]

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            evaluated = model(speech, lengths).encoder_out
        return [evaluated, *gradients(model(speech, lengths).encoder_out, used)]

    assert cpu_versions
    got = run()
    use_cpu_versions(False)
    for a, b in zip(got, run(), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


@pytest.mark.parametrize("name", sorted(cpu.VERSIONS))
def test_every_version_is_of_a_function(name: str) -> None:
    """And has its name, without which it would never be called."""
    rooms = ["convolution", "conv_embed", "fbank", "layer", "regularizers", "scaling"]
    modules = [f"espnet2_spear.zipformer.{m}" for m in [*rooms, "scores"]]
    own = [getattr(import_module(m), name, None) for m in modules]
    found = [m for m, f in zip(modules, own, strict=True) if f and f.__module__ == m]
    assert len(found) == 1


@needs_onednn
def test_linear_maps(onednn: None) -> None:
    torch.manual_seed(0)
    first, second = torch.nn.Linear(6, 9), torch.nn.Linear(9, 4)
    x = torch.randn(3, 8, 6, requires_grad=True)
    keep = torch.rand(3, 1, 9) * 2
    inputs = [x, *first.parameters(), *second.parameters()]
    got = swoosh_linear(second, linear(first, x), SWOOSH_L, keep)
    expected = second(swoosh_l(first(x)) * keep)
    assert_same(gradients(got, inputs), gradients(expected, inputs))
    with torch.no_grad():
        got = swoosh_linear(second, linear(first, x), SWOOSH_L, keep)
    torch.testing.assert_close(got, expected)


@needs_onednn
@pytest.mark.parametrize("batch", [1, 2])
def test_no_operation_takes_the_reference_code_of_onednn(
    capfd: pytest.CaptureFixture, onednn: None, batch: int
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
    assert torch.equal(linear(layer, x), layer(x))
    assert torch.equal(swoosh_linear(layer, x, SWOOSH_L), layer(swoosh_l(x)))
    plain = torch.nn.Linear(4, 5)
    plain.register_forward_hook(lambda module, args, out: out + 1)
    assert torch.equal(linear(plain, x), plain(x))


@needs_onednn
@pytest.mark.parametrize("balanced", [False, True])
def test_pointwise_pair(
    monkeypatch: pytest.MonkeyPatch, onednn: None, balanced: bool
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(cpu, "ROWS", 50)
    module = ConvNeXt(4, BatchCount() if balanced else None)
    module.balance_hidden.prob = 1.0
    x = torch.randn(2, 4, 9, 7).to(memory_format=torch.channels_last).requires_grad_()
    parameters = [module.pointwise_conv1, module.pointwise_conv2]
    inputs = [x, *(p for m in parameters for p in m.parameters())]
    got = gradients(pointwise(module, x), inputs)
    use_cpu_versions(False)
    assert_same(got, gradients(pointwise(module, x), inputs))


@pytest.mark.parametrize("short", [False, pytest.param(True, marks=needs_onednn)])
def test_embedding_gradients(monkeypatch: pytest.MonkeyPatch, short: bool) -> None:
    """As in float64, where every operation is PyTorch's own."""
    torch.manual_seed(0)
    monkeypatch.setattr(cpu, "ONEDNN", short)
    embedding, x = ConvEmbed(24, 8, (2, 4, 8)), torch.randn(2, 31, 24)
    got = gradients(embedding(x), list(embedding.parameters()))
    embedding.double()
    expected = gradients(embedding(x.double()), list(embedding.parameters()))
    assert_same(got, [y.float() for y in expected])


def test_bias_norm_gradient() -> None:
    norm = BiasNorm(5).double()
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)

    def call(x, bias, log_scale):
        rms = (x - bias).square().mean(dim=-1, keepdim=True).rsqrt()
        return x * rms * log_scale.exp()

    inputs = [x, norm.bias, norm.log_scale]
    assert_same(gradients(norm(x), inputs), gradients(call(*inputs), inputs))

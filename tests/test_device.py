"""Nothing waits for the device: no look at a value, no tensor elsewhere, whole graphs.

Fake tensors on "cuda:0" know shapes, types and devices, and no values: an operation on
tensors of two devices raises, and so does whatever the host would have to wait for
(DataDependentOutputException). No GPU is needed, nothing is computed. The backward pass
asks for a driver there: it runs on "meta" tensors, which have no values either.
"""

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from test_zipformer_exact import NARROW, build
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from espnet2_spear.asr.encoder.zipformer_encoder import ZipformerEncoder
from espnet2_spear.asr.frontend.spear import SpearFrontend
from espnet2_spear.codes.targets import TeacherCodes
from espnet2_spear.spear import checks, student
from espnet2_spear.spear.masking import SpanMasker
from espnet2_spear.spear.mixing import Mixer, MixerConfig
from espnet2_spear.spear.model import SpearPretrainModel
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import STACK_FIELDS, ZipformerConfig

# Three stacks of a layer each, as wide as published.
BASE = ZipformerConfig.from_name("base")
BASE = replace(BASE, **{name: getattr(BASE, name)[:3] for name in STACK_FIELDS})
BASE = replace(BASE, num_encoder_layers=(1, 1, 1))
DOMAINS = ["speech", "audio"]
TEACHERS = {
    "speech": TeacherCodes(16, 256, 50.0),
    "audio": TeacherCodes(8, 256, 25.0, layer=2),
}
SECONDS = 4


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast believes that there is one."""
    name = "amp_definitely_not_available"
    monkeypatch.setattr(torch.cuda.amp.common, name, lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast, which knows no such device, is off there."""
    autocast, is_enabled = torch.autocast, torch.is_autocast_enabled

    def autocast_or_nothing(kind: str, *args, **kwargs):
        return nullcontext() if kind == "meta" else autocast(kind, *args, **kwargs)

    monkeypatch.setattr(torch, "autocast", autocast_or_nothing)
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda kind: kind != "meta" and is_enabled(kind)
    )


def put(module: nn.Module, device: str) -> nn.Module:
    """Give a module parameters and buffers without values on a device."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, old in tensors.items():
                if old is not None:
                    new = torch.empty(old.shape, dtype=old.dtype, device=device)
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, old.requires_grad)
                    tensors[name] = new
    return module


def make_model(config: ZipformerConfig = BASE) -> SpearPretrainModel:
    conf = MixerConfig.from_dict({"preset": "token_mixing"}, DOMAINS, list(TEACHERS))
    with torch.device("meta"):
        student = SpearEncoder(config)
        mixer = Mixer(conf, DOMAINS, TEACHERS)
        options = {"loss_weights": "joint", "masker": SpanMasker(), "mixer": mixer}
        return SpearPretrainModel(student, TEACHERS, DOMAINS, **options)


def make_batch(device: str) -> dict[str, Tensor]:
    shapes = {
        "speech_lengths": (4,),
        "domain": (4, 1),
        "codes_speech": (4, 50 * SECONDS, 16),
        "codes_audio": (4, 25 * SECONDS, 8),
        "noise_lengths": (2,),
    }
    batch = {k: torch.zeros(v, dtype=torch.long) for k, v in shapes.items()}
    batch["speech"] = torch.zeros(4, 16000 * SECONDS)
    batch["noise"] = torch.zeros(2, 48000)
    return {k: v.to(device) for k, v in batch.items()}


CONFIGS = pytest.mark.parametrize(
    "changes",
    [{}, {"causal": True, "padding": "exact", "output_downsampling_factor": 2}],
)


@CONFIGS
@pytest.mark.parametrize("amp", [False, True])
def test_forward_pass_of_training(
    gpu: None, monkeypatch: pytest.MonkeyPatch, amp: bool, changes: dict
) -> None:
    """Regularisers, bfloat16, two teachers, mixing."""
    # How long mixtures become depends on random numbers, which the host draws and so
    # knows without a wait; here they are fake as all others.
    monkeypatch.setattr(Mixer, "_extension", lambda self, draws: 1600)
    model = make_model(replace(BASE, **changes))
    for coin in (0.0, 0.9):  # whatever acts by chance does, or does not
        monkeypatch.setattr(random, "random", lambda coin=coin: coin)
        with FakeTensorMode(allow_non_fake_inputs=True):
            put(model, "cuda:0").train()
            with torch.autocast("cuda", torch.bfloat16, enabled=amp):
                loss, stats, weight = model(**make_batch("cuda:0"))
        found = {x.device.type for x in (loss, weight, *stats.values())}
        assert found == {"cuda"} and len(stats) > 10
        assert loss.dtype == torch.float32


@CONFIGS
def test_backward_pass_of_training(
    meta: None, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    model = put(make_model(replace(BASE, **changes)), "meta").train()
    for coin in (0.0, 0.9):
        monkeypatch.setattr(random, "random", lambda coin=coin: coin)
        model.zero_grad()
        loss, _, _ = model(**make_batch("meta"))
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_both_ways_find_a_look_at_a_value(
    meta: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(self, x: Tensor, *unused) -> Tensor:
        return x if bool((x > 0).all()) else -x

    monkeypatch.setattr(SpearEncoder, "encode", look)
    model = put(make_model(), "meta").train()
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(**make_batch("meta"))
    monkeypatch.setattr(Mixer, "_extension", lambda self, draws: 1600)
    with FakeTensorMode(allow_non_fake_inputs=True):
        put(model, "cuda:0")
        with pytest.raises(DataDependentOutputException):
            model(**make_batch("cuda:0"))


@pytest.mark.parametrize("amp, training", [(False, False), (True, True)])
@pytest.mark.parametrize(
    "make",
    [
        lambda: SpearFrontend(arch=BASE.to_dict(), mask={}, freeze=False),
        lambda: SpearFrontend(arch=BASE.to_dict(), layer=2, stack=2, logmel="concat"),
        lambda: ZipformerEncoder(1, BASE.to_dict(), interctc_layer_idx=[1]),
        lambda: SpearEncoder(replace(BASE, padding="exact")),
        lambda: SpearEncoder(ZipformerConfig.from_name("base")),  # all of it
    ],
)
def test_frontend_and_encoder(
    gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], nn.Module],
    training: bool,
    amp: bool,
) -> None:
    """Nothing is looked at but, outside training, the waveforms at the door: once."""
    looks = []

    def check(*args, wait: bool = False) -> None:
        if wait:
            looks.append(args)
        else:
            checks.check_waveforms(*args)

    monkeypatch.setattr(student, "check_waveforms", check)
    # Fake tensors pass for real ones: a check that waited for their values would raise.
    monkeypatch.setattr(checks, "have_values", lambda *tensors: True)
    with torch.device("meta"):
        module = make()
    with FakeTensorMode(allow_non_fake_inputs=True):
        put(module, "cuda:0").train(training)
        speech = torch.zeros(4, 16000 * SECONDS, device="cuda:0")
        lengths = torch.zeros(4, dtype=torch.long, device="cuda:0")
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            out = module(speech, lengths)
    is_door = isinstance(module, SpearFrontend | ZipformerEncoder)
    assert len(looks) == (is_door and not training)
    first = out[0] if isinstance(out, tuple) else out.encoder_out
    first = first[0] if isinstance(first, tuple) else first
    assert first.device.type == "cuda"


class Exported(nn.Module):
    """The student with tensors for results, from waveforms or from the fbank."""

    def __init__(self, student: SpearEncoder, waveforms: bool) -> None:
        super().__init__()
        self.student, self.waveforms = student, waveforms

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        call = self.student if self.waveforms else self.student.encode
        out = call(x, lengths)
        return out.encoder_out, out.encoder_out_lens, *out.hidden_states


def inputs(waveforms: bool, batch: int, length: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(batch)
    shape = (batch, length * 160) if waveforms else (batch, length, 128)
    lengths = torch.full((batch,), shape[1])
    lengths[-1] -= shape[1] // 3
    return torch.randn(shape) * 0.1, lengths


def assert_alike(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


TWO_STACKS = {name: getattr(NARROW, name)[:2] for name in STACK_FIELDS}


@pytest.mark.parametrize(
    ("waveforms", "changes"),
    [(False, {}), (True, {"padding": "exact", "output_downsampling_factor": 2})],
)
def test_evaluation_is_one_graph(waveforms: bool, changes: dict) -> None:
    module = Exported(build(NARROW, **TWO_STACKS, **changes), waveforms)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch.no_grad():
        for size, frames in ((2, 101), (3, 77)):
            args = inputs(waveforms, size, frames)
            assert_alike(compiled(*args), module(*args))

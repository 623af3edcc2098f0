"""Number formats of training: what bfloat16 and float16 change, and what not."""

import random
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from espnet2_spear.codes.targets import TeacherCodes
from espnet2_spear.optimizers.scaled_adam import ScaledAdam
from espnet2_spear.spear.masking import SpanMasker
from espnet2_spear.spear.model import SpearPretrainModel
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import ZipformerConfig
from espnet2_spear.zipformer.encoder import Downsample

SAMPLES = (16000, 12000)


def build(regularize: bool, causal: bool = False) -> SpearPretrainModel:
    torch.manual_seed(0)
    # With 16 channels oneDNN never ends to generate code for depthwise convolutions in
    # float16, on CPUs that have it (AVX512-FP16).
    config = ZipformerConfig.from_name("tiny")
    config = replace(config, regularize=regularize, causal=causal)
    return SpearPretrainModel(
        student=SpearEncoder(config),
        teachers={
            "speech": TeacherCodes(num_codebooks=4),
            "audio": TeacherCodes(num_codebooks=2, frame_rate=25.0),
        },
        domains=["speech", "audio"],
        loss_weights={
            "speech": {"speech": 1.0},
            "audio": {"speech": 1.0, "audio": 0.1},
        },
        masker=SpanMasker(),
    ).train()


def make_batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    draw = {"generator": generator}
    return {
        "speech": 0.1 * torch.randn(2, max(SAMPLES), **draw),
        "speech_lengths": torch.tensor(SAMPLES),
        "domain": torch.tensor([[0], [1]]),
        "codes_speech": torch.randint(0, 256, (2, 50, 4), **draw),
        "codes_audio": torch.randint(0, 256, (2, 25, 2), **draw),
    }


def gradients(model: SpearPretrainModel, dtype: torch.dtype | None) -> torch.Tensor:
    """Loss and gradients of a step, with the same random draws every time."""
    torch.manual_seed(7)
    random.seed(7)  # regularisers that act by chance
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = model(**make_batch(0))[0]
    loss.sum().backward()
    flat = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.detach().sum(), torch.cat(flat)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("regularize", "causal"), [(False, False), (True, False), (True, True)]
)
def test_loss_and_gradients_are_close(
    dtype: torch.dtype, regularize: bool, causal: bool
) -> None:
    """Stated bounds: 0.1 % of the loss, 5 % of the gradient (all of it as a vector)."""
    model = build(regularize, causal)
    loss, grad = gradients(model, None)
    other_loss, other_grad = gradients(model, dtype)
    assert loss.dtype == other_loss.dtype == grad.dtype == torch.float32
    assert abs(other_loss / loss - 1) < 1e-3
    assert 0 < (other_grad - grad).norm() < 0.05 * grad.norm()


class _Dtypes(TorchDispatchMode):
    """Remembers the dtypes that operations were done in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if tensors:
            self.seen.setdefault(name, set()).add(tensors[0].dtype)
        if name == "_softmax":
            self.seen.setdefault("softmax result", set()).add(out.dtype)
        return out


def test_what_stays_in_float32_does() -> None:
    """Spectra, attention's softmax, norms, the loss; matrix products do not."""
    model = build(False)
    with torch.autocast("cpu", torch.bfloat16), _Dtypes() as dtypes:
        model(**make_batch(0))
    seen = dtypes.seen
    assert torch.bfloat16 in seen["addmm"] | seen["mm"] | seen["bmm"]
    wide = {torch.float32, torch.float64}
    assert seen["_fft_r2c"] == {torch.float32}
    assert seen["softmax result"] == {torch.float32}
    for name in ("log", "exp_", "rsqrt"):
        assert seen[name] <= wide, name
    # Regularisers work on the gradients of whatever was computed; their statistics
    # are float32 (see test_zipformer_training.py for what they compute).


def test_averages_of_frames_stay_in_float32() -> None:
    frames, average = torch.randn(2, 9, 4), Downsample(2)
    with torch.autocast("cpu", torch.bfloat16):
        out = average(frames)
    torch.testing.assert_close(out, average(frames), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_stays_finite(dtype: torch.dtype) -> None:
    """With the scaler that ESPnet uses; the loss falls as in float32."""
    losses = {}
    for used in (None, dtype):
        model = build(True)
        opt = ScaledAdam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**10, enabled=used is not None
        )
        losses[used] = []
        for step in range(12):
            torch.manual_seed(step)
            with torch.autocast("cpu", used, enabled=used is not None):
                loss = model(**make_batch(step % 2))[0].sum()
            opt.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(opt)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            assert norm.isfinite()
            scaler.step(opt)
            scaler.update()
            losses[used].append(loss.item())
        assert all(p.isfinite().all() for p in model.parameters())
    full, reduced = losses[None], losses[dtype]
    assert full[-1] < full[0] - 0.05
    assert abs(reduced[-1] / full[-1] - 1) < 0.01

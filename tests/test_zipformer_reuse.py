"""One network used in several ways, one after the other."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from espnet2.torch_utils.load_pretrained_model import load_pretrained_model
from student_files import write_student
from test_zipformer_exact import NARROW, build

from espnet2_spear.asr.encoder.zipformer_encoder import ZipformerEncoder
from espnet2_spear.asr.frontend.spear import SpearFrontend
from espnet2_spear.hub.load import load_model
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.tasks.spear import SpearTask
from espnet2_spear.zipformer import cpu
from espnet2_spear.zipformer.config import ZipformerConfig
from espnet2_spear.zipformer.schedule import SCHEDULES_END

LENGTHS = torch.tensor([16000, 12000])


def noise(samples: int = 16000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, samples, generator=generator) * 0.1


def loss_of(model: SpearEncoder) -> torch.Tensor:
    return model(noise(), LENGTHS).encoder_out.square().sum()


@pytest.mark.parametrize("blocks", [False, True])
def test_a_pass_for_some_gradients_leaves_nothing_to_the_next(
    monkeypatch: pytest.MonkeyPatch, blocks: bool
) -> None:
    """Gradient surgery asks for gradients of parts, and then for all."""
    if blocks:
        monkeypatch.setattr(cpu, "MAX_HEAD_WEIGHTS", 0)
    model = build(NARROW)
    layer = model.encoder.encoders[0].layers[0]
    of_values = layer.self_attn1.in_proj.weight
    of_weights = layer.self_attn_weights.in_proj.weight
    (expected,) = torch.autograd.grad(loss_of(model), of_weights)
    loss = loss_of(model)
    torch.autograd.grad(loss, of_values, retain_graph=True)
    loss.backward()
    torch.testing.assert_close(of_weights.grad, expected)


def test_gradients_are_laid_out_as_weights_are() -> None:
    """DDP warns of others, and copies them."""
    model = build(NARROW)
    loss_of(model).backward()
    odd = [
        name
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.stride() != p.stride()
    ]
    assert not odd


def test_training_after_inference_mode() -> None:
    model = SpearEncoder(NARROW)
    with torch.inference_mode():
        model.eval()(noise(), LENGTHS)
    loss_of(model.train()).backward()
    assert model.encoder_embed.out.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-4), (torch.bfloat16, 0.3)]
)
def test_a_model_converted_as_a_whole_takes_waveforms(
    dtype: torch.dtype, tolerance: float
) -> None:
    """As ESPnet's Speech2Text(dtype=...) does, which converts the waveforms, too."""
    model = build(NARROW)
    other = copy.deepcopy(model).to(dtype)
    assert other.fbank.mel.dtype == torch.float32
    with torch.no_grad():
        expected = model(noise(), LENGTHS).encoder_out
        # Rounded to bfloat16 the samples are others: only the network is compared.
        got = other(noise().to(torch.float64), LENGTHS).encoder_out
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, atol=tolerance, rtol=tolerance)


def test_a_student_without_regularisers_takes_one_with_them(tmp_path: Path) -> None:
    def encoder(regularize: bool) -> torch.nn.Module:
        arch = {"name": "tiny", "regularize": regularize}
        return torch.nn.ModuleDict({"encoder": ZipformerEncoder(1, arch=arch)})

    source, target = encoder(True), encoder(False)
    file = tmp_path / "first_stage.pth"
    torch.save(source.state_dict(), file)
    assert "encoder.schedule.batches" in source.state_dict()
    load_pretrained_model(f"{file}:encoder:encoder", target, False)
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])
    tiny = ZipformerConfig.from_name("tiny")
    assert load_model(file).config.architecture() == tiny.architecture()


def holder(place: str, start: float = 0.0) -> torch.nn.Module:
    """A model with the student at a place, its schedules at the start."""
    arch = {"name": "tiny", "regularize": True, "regularize_start": start}
    if place == "encoder":
        return torch.nn.ModuleDict({"encoder": ZipformerEncoder(1, arch=arch)})
    if place == "frontend.upstream":
        frontend = SpearFrontend(arch=arch, freeze=False)
        return torch.nn.ModuleDict({"frontend": frontend})
    conf = ROOT / "conf/train_spear_mini_speech_audio.yaml"
    options = ["--config", str(conf), "--output_dir", "unused", "--student", "tiny"]
    options += ["--student_conf", "regularize=true"]
    options += ["--student_conf", f"regularize_start={start}"]
    return SpearTask.build_model(SpearTask.get_parser().parse_args(options))


@pytest.mark.parametrize("start", [0.0, 700.0])
@pytest.mark.parametrize("place", ["encoder", "frontend.upstream", "student"])
def test_schedules_of_loaded_weights_are_at_their_end(
    tmp_path: Path, place: str, start: float
) -> None:
    """Or where the user wants them; a training of the model itself goes on."""
    weights = f"{write_student(tmp_path)}:student:{place}"
    loaded, resumed, same = holder(place, start), holder(place), holder(place, start)
    load_pretrained_model(weights, loaded, False)
    count = loaded.get_submodule(place).encoder.count
    assert count.value == (start or SCHEDULES_END)
    count.value = 12.0
    resumed.load_state_dict(loaded.state_dict())
    assert resumed.get_submodule(place).encoder.count.value == 12.0
    # Nothing came.
    same.load_state_dict(copy.deepcopy(same.state_dict()))
    assert same.get_submodule(place).encoder.count.value == start

"""Pre-training through its entry point, in every supported version of ESPnet."""

import importlib
import pkgutil
from pathlib import Path

import pytest
import torch
from tiny_training import CODEBOOKS, RATE, options, train_twice, write_data

import espnet2_spear
from espnet2_spear.tasks.spear import SpearTask

pytestmark = pytest.mark.second_env


def test_every_module_can_be_imported() -> None:
    names = [
        module.name
        for module in pkgutil.walk_packages(
            espnet2_spear.__path__, f"{espnet2_spear.__name__}."
        )
    ]
    assert len(names) > 30
    for name in names:
        importlib.import_module(name)


@pytest.mark.parametrize("iterator", ["sequence", "task"])
def test_pretraining_steps_and_resumes(tmp_path: Path, iterator: str) -> None:
    cmd = options(write_data(tmp_path / "data", 4), tmp_path / "exp")
    cmd += ["--iterator_type", iterator]
    if iterator == "sequence":
        cmd += ["--student_conf", "causal=true", "--student_conf", "padding=exact"]
    else:
        cmd += ["--batch_type", "numel", "--batch_bins", "80000"]
        cmd += ["--sampler_conf", "domain_weights.audio=2"]
        cmd += ["--sampler_conf", "mix_headroom_seconds=0.5"]
        cmd += ["--accum_grad", "2", "--num_iters_per_epoch", "4"]
    states = train_twice(cmd, tmp_path)
    for name, value in states[1].items():
        assert value.isfinite().all(), name
    moved = {k for k, v in states[0].items() if not torch.equal(v, states[1][k])}
    assert any(name.startswith("student.") for name in moved)
    if iterator == "task":
        (manifest,) = (tmp_path / "exp/manifest").glob("*/manifest.json")
        assert "audio" in manifest.read_text(encoding="utf-8")
        assert not list((tmp_path / "exp").glob("skipped*"))
    # The second training goes on where the schedules of the first ended.
    first, second = (float(s["schedule.batches"]) for s in states)
    assert 0 < first < second
    if iterator == "sequence":  # equal batches
        assert second == pytest.approx(2 * first)
    checkpoint = torch.load(tmp_path / "exp/checkpoint.pth", weights_only=True)
    for stats in checkpoint["reporter"]["stats"].values():
        assert "mixed_noise" in stats["train"]
        assert "mixed_noise" not in stats["valid"] and stats["valid"]["loss"] > 0
    # What the next stage needs: the student opens from the experiment's folder.
    model = espnet2_spear.load_model(tmp_path / "exp/2epoch.pth")
    out = model(torch.zeros(1, RATE), torch.tensor([RATE]))
    assert out.encoder_out.isfinite().all()
    exact = iterator == "sequence"
    assert model.config.regularize and model.config.causal == exact
    assert model.config.padding == ("exact" if exact else "compatible")
    names = {k.removeprefix("student.") for k in states[1] if k.startswith("student.")}
    assert set(model.state_dict()) == names  # the count is not the student's


@pytest.mark.parametrize(
    ("given", "audio_on_speech"),
    [
        ([], 0.0),  # asymmetric
        (["preset=joint"], 0.1),
        (["{preset: joint, weights: {audio: 0.5}}"], 0.5),
        (["speech.speech=1", "speech.audio=0.3"], 0.3),
    ],
)
def test_loss_weights_of_the_command_line(
    given: list[str], audio_on_speech: float
) -> None:
    cmd = ["--student", "tiny", "--output_dir", "exp"]
    for name, count in CODEBOOKS.items():
        cmd += ["--teachers", f"{name}.num_codebooks={count}"]
    for word in given:
        cmd += ["--loss_weights", word]
    args = SpearTask.get_parser().parse_args(cmd)
    table = SpearTask.build_model(args).loss_weights
    assert table[0].tolist() == pytest.approx([1.0, audio_on_speech])
    # config.yaml has the table.
    assert args.loss_weights["speech"].get("audio", 0.0) == audio_on_speech

"""What the task does for DeepSpeed by ESPnet; the engine itself is not needed."""

import inspect
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from espnet2.tasks.abs_task import AbsTask
from espnet2.train.trainer import Trainer
from test_training_precision import build, make_batch
from tiny_training import options, write_data

from espnet2_spear.errors import UserError
from espnet2_spear.tasks import spear
from espnet2_spear.tasks.spear import SpearTask
from espnet2_spear.train.gradients import scale_loss_by_weight
from espnet2_spear.train.options import check_deepspeed_config

CONF = Path(__file__).resolve().parent.parent / "conf" / "deepspeed_zero2.json"


def gradient(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_gradients_are_the_mean_over_ranks() -> None:
    """That trainer: loss / sum of weights * ranks; the engine: mean over ranks."""
    model = build(False)
    batches = [make_batch(0), {**make_batch(1)}]
    batches[1]["speech_lengths"] = torch.tensor([9000, 4000])

    def run(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
        torch.manual_seed(0)
        loss, _, weight = model(**batch)
        return loss, float(weight)

    plain = [run(batch) for batch in batches]
    total = sum(weight for _, weight in plain)
    assert plain[0][1] > 1.5 * plain[1][1]
    expected = sum(gradient(model, loss * weight / total) for loss, weight in plain)
    scale_loss_by_weight(model)
    got = sum(gradient(model, run(batch)[0] / total * 2) for batch in batches) / 2
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


def test_configurations(tmp_path: Path) -> None:
    check_deepspeed_config(CONF)
    rounded = []
    for section in ("bf16", "fp16", "amp"):
        rounded.append(tmp_path / f"{section}.json")
        rounded[-1].write_text(f'{{"{section}": {{"enabled": true}}}}')
    broken = tmp_path / "broken.json"
    broken.write_text("{", encoding="utf-8")
    for path, message in [
        *((path, "torch_autocast") for path in rounded),
        (broken, "broken.json"),
        (tmp_path / "none.json", "none.json"),
        (None, "--deepspeed_config"),
    ]:
        with pytest.raises(UserError, match=message):
            check_deepspeed_config(path)


def test_the_task_scales_the_loss_and_gives_up_its_trainer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = options(write_data(tmp_path), tmp_path / "exp", "--use_deepspeed", "true")
    words += ["--deepspeed_config", str(CONF)]
    args = SpearTask.get_parser().parse_args(words)
    model = SpearTask.build_model(args)
    args.distributed = True
    scaled = SpearTask.build_model(args)
    assert len(scaled._forward_hooks) == len(model._forward_hooks) + 1
    seen = []
    monkeypatch.setattr(spear, "check_codes_facts", lambda args: None)
    monkeypatch.setattr(spear, "watch_ranks", lambda args: nullcontext())
    monkeypatch.setattr(SpearTask, "trainer", SpearTask.trainer)  # is set back
    monkeypatch.setattr(
        AbsTask, "main_worker", classmethod(lambda cls, args: seen.append(cls.trainer))
    )
    SpearTask.main_worker(args)
    assert seen == [Trainer]


def test_espnet_exchanges_its_own_trainer_only() -> None:
    """Why the task gives up its trainer for DeepSpeed, on the class, as ESPnet does."""
    source = inspect.getsource(AbsTask.main_worker)
    assert "elif cls.trainer != Trainer:" in source
    assert "cls.trainer = DeepSpeedTrainer" in source

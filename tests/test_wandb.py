"""What a run of wandb gets to see, by a module that writes down what it is told."""

import json
import math
import sys
import types
from pathlib import Path

import espnet2.tasks.abs_task
import pytest
from tiny_training import options, train, write_data

pytestmark = pytest.mark.second_env


def recorder(path: Path) -> types.ModuleType:
    """As much of wandb as ESPnet and the trainer use; a JSON line for each call."""

    def write(call: str, content: dict) -> None:
        with path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"call": call, **content}) + "\n")

    class Image:
        def __init__(self, file: str) -> None:
            self.file = file

    def log(values: dict) -> None:
        shown = {
            k: v.file if isinstance(v, Image) else float(v) for k, v in values.items()
        }
        write("log", {"values": shown})

    module = types.ModuleType("wandb")
    module.Image, module.log, module.run = Image, log, True
    module.login = lambda: True
    module.init = lambda **conf: write("init", {"project": conf["project"]})
    module.finish = lambda: write("finish", {})
    module.errors = types.SimpleNamespace(UsageError=RuntimeError)
    module.config = types.SimpleNamespace(
        update=lambda args, allow_val_change=False: write(
            "config", {"student": args.student}
        )
    )
    return module


def test_wandb_gets_curves_and_pictures(tmp_path: Path) -> None:
    data, log, calls = write_data(tmp_path / "data", 6), tmp_path / "log", []
    cmd = options(data, tmp_path / "exp", "--log_interval", 1, "--max_epoch", 2)
    cmd += ["--use_wandb", "true", "--wandb_project", "spear"]
    cmd += ["--use_matplotlib", "true", "--num_att_plot", "1"]

    def install() -> None:
        module = recorder(tmp_path / "calls")
        sys.modules["wandb"] = espnet2.tasks.abs_task.wandb = module

    assert train(cmd, log, install) == 0, log.read_text()
    for line in (tmp_path / "calls").read_text(encoding="utf-8").splitlines():
        calls.append(json.loads(line))
    assert calls[0] == {"call": "init", "project": "spear"}
    assert calls[1] == {"call": "config", "student": "tiny"}
    assert calls[-1]["call"] == "finish"
    logged = [call["values"] for call in calls if call["call"] == "log"]

    # Percentiles of the gradient's norm and hours, at every line of progress: of three
    # batches in two epochs.
    progress = [values for values in logged if "train/hours_of_audio" in values]
    assert len(progress) == 6
    hours = [values["train/hours_of_audio"] for values in progress]
    sizes = [int(x.split()[1]) for x in Path(data["shape"]).read_text().splitlines()]
    assert hours == sorted(hours)
    assert math.isclose(hours[-1], 2 * sum(sizes) / 16000 / 3600)
    for values in progress:
        norms = [values[f"train/grad_norm_p{p}"] for p in (50, 90, 99)]
        assert 0 < norms[0] <= norms[1] <= norms[2]

    # With them what the batches were; and at the end of an epoch, its means.
    steps = [values for values in logged if "iteration" in values]
    assert [values["iteration"] for values in steps] == [1, 2, 3, 4, 5, 6]
    epochs = [values for values in logged if "epoch" in values]
    assert [values["epoch"] for values in epochs] == [1, 2]
    for name in (
        *("loss", "speech_speech_acc_masked", "audio_speech_acc_masked"),
        *("audio_audio_acc_group0", "audio_audio_acc_unmasked", "audio_audio_loss"),
        *("mask_ratio", "padding_waste", "mixed_noise"),
    ):
        # Batches of one domain have nothing of the other.
        found = [values[f"metrics/{name}"] for values in steps]
        assert any(math.isfinite(value) for value in found), name
        assert all(f"train/train_{name}_epoch" in values for values in epochs)
    assert all(values["metrics/optim0_lr0"] > 0 for values in steps)
    assert all(values["valid/valid_loss_epoch"] > 0 for values in epochs)

    pictures = {k: v for values in logged for k, v in values.items() if "/u0" in k}
    assert pictures == {
        "predictions/u0000": str(tmp_path / "exp/predictions/u0000/2ep.png")
    }
    assert Path(pictures["predictions/u0000"]).read_bytes().startswith(b"\x89PNG")

"""Low precision: which, at which loss scale, and steps whose gradients overflow."""

import contextlib
import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from espnet2.train.reporter import Reporter
from test_training_precision import build, make_batch
from tiny_training import differs, options, train, write_data
from torch import nn

from espnet2_spear.optimizers.scaled_adam import ScaledAdam
from espnet2_spear.tasks.spear import SpearTask
from espnet2_spear.train.average import RunningAverage
from espnet2_spear.train.batches import Window
from espnet2_spear.train.checkpoint import SKIPPED, RunState
from espnet2_spear.train.step import MIN_LOSS_SCALE, OptimizerStep, TrainingError
from espnet2_spear.train.trainer import SpearTrainer
from espnet2_spear.zipformer.schedule import BatchCount, BatchCountState

# Makes of the loss what a test wants; the gradients are real.
Change = Callable[[torch.Tensor, nn.Module], torch.Tensor]


class Half(nn.Module):
    """The model with products in float16, as on a GPU without bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build(False)
        self.change: Change = lambda loss, model: loss
        self.loss_scale = self.model.loss_scale

    def forward(self, utt_id: list[str], **batch: torch.Tensor) -> tuple:
        with torch.autocast("cpu", torch.float16):
            loss, stats, weight = self.model(utt_id=utt_id, **batch)
        return self.change(loss, self.model), stats, weight


class Training:
    """Optimizer steps with a scaler, as the trainer does them."""

    def __init__(
        self, folder: Path, scale: float | None, optim: str = "scaledadam"
    ) -> None:
        self.model = Half()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = (
            ScaledAdam(parameters, lr=0.02)
            if optim == "scaledadam"
            else torch.optim.AdamW(parameters, lr=0.002, fused=True)
        )
        self.scaler = scale and torch.amp.GradScaler("cpu", init_scale=scale)
        self.state = RunState(
            folder,
            self.model,
            self.optimizer,
            None,
            RunningAverage(0),
            self.scaler,
        )
        self.options = SimpleNamespace(
            seed=0,
            device=torch.device("cpu"),
            autocast=contextlib.nullcontext,  # Half has it on
            grad_clip=1e9,
            grad_clip_type=2.0,
            max_skipped_steps=2,
        )

    def step(self, batches: int = 1) -> float:
        """One step; its gradient norm."""
        reporter = Reporter()
        reporter.set_epoch(1)
        window = Window(
            [([f"u{i}", f"v{i}"], make_batch(i)) for i in range(batches)],
            [0.0] * batches,
        )
        with reporter.observe("train") as sub:
            step = OptimizerStep(self.model, self.state, sub, self.options)
            return step(window).grad_norm

    def content(self) -> dict:
        """Parameters and what the optimizer remembers of them."""
        return copy.deepcopy(
            {"model": self.model.state_dict(), "optim": self.optimizer.state_dict()}
        )


def test_gradients_are_clipped(tmp_path: Path) -> None:
    training = Training(tmp_path, None)
    parameters = [p for p in training.model.parameters() if p.requires_grad]
    training.state.optimizer = torch.optim.SGD(parameters, lr=1.0)
    training.options.grad_clip = 1e-3
    before = [p.detach().clone() for p in parameters]
    assert training.step() > 1e-2  # what is reported is the norm before
    pairs = zip(parameters, before, strict=True)
    change = torch.stack([(p - b).norm() for p, b in pairs]).norm()
    assert float(change) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("optim", ["scaledadam", "adamw"])
@pytest.mark.parametrize("batches", [1, 2])
def test_overflow_lowers_the_scale_until_steps_are_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, optim: str, batches: int
) -> None:
    caplog.set_level(logging.INFO)
    scale, overflows, norms = 2.0**21, 0, []
    training = Training(tmp_path, scale, optim)
    while len(norms) < 3 or not torch.tensor(norms[-3:]).isfinite().all():
        assert len(norms) < 40
        before = training.content()
        norms.append(training.step(batches))
        done = torch.tensor(norms[-1]).isfinite()
        assert (differs(before, training.content()) != "") == done
        scale *= 1.0 if done else 0.5
        overflows += not done
        assert training.scaler.get_scale() == scale
    # It did overflow, more often than steps may be skipped.
    assert training.options.max_skipped_steps < overflows
    assert caplog.text.count("gradients overflow at loss scale") == overflows
    assert training.state.skipped == 0 and not (tmp_path / SKIPPED).exists()
    assert training.state.any_valid
    # The gradients are those without a scaler.
    torch.manual_seed(0)
    other = Training(tmp_path, None, optim)
    other.model.load_state_dict(before["model"])
    other.optimizer.load_state_dict(before["optim"])
    assert other.step(batches) == pytest.approx(norms[-1], rel=0.05)


def test_gradients_that_no_scale_makes_finite_are_a_fault(tmp_path: Path) -> None:
    def infinite_slope(loss: torch.Tensor, model: nn.Module) -> torch.Tensor:
        weight = model.heads["speech"].weight
        return loss + (weight.sum() * 0).abs().sqrt()

    training = Training(tmp_path, 4 * MIN_LOSS_SCALE)
    training.model.change = infinite_slope
    before = training.content()
    for _ in range(4):  # two that count as overflow, two that do not
        training.step()
    assert training.state.skipped == 2
    records = [json.loads(x) for x in (tmp_path / SKIPPED).read_text().splitlines()]
    assert [r["step"] for r in records] == [3, 4]
    assert {r["not_finite"] for r in records} == {"gradient"}
    assert records[0]["utterances"] == ["u0", "v0"]
    with pytest.raises(TrainingError, match="3 steps of epoch 1"):
        training.step()
    assert differs(before, training.content()) == "" and not training.state.any_valid


@pytest.mark.parametrize("scale", [16.0, None])
def test_a_bad_loss_is_a_fault_of_the_data_not_of_the_scale(
    tmp_path: Path, scale: float | None
) -> None:
    """Whatever its gradients are."""
    changes = [
        lambda loss, model: loss * float("nan"),
        lambda loss, model: loss + float("inf"),  # whose gradients are finite
    ]
    training = Training(tmp_path, scale)
    before = training.content()
    for count, change in enumerate(changes, 1):
        training.model.change = change
        training.step()
        assert training.state.skipped == count
        assert scale is None or training.scaler.get_scale() == scale
    assert differs(before, training.content()) == ""
    training.model.change = lambda loss, model: loss
    training.step()
    assert training.state.skipped == 2
    assert differs(before, training.content()) != ""


def test_a_norm_that_overflows_is_no_step(tmp_path: Path) -> None:
    """Each gradient is finite, their norm is not: clipping made all of them zeros."""
    training = Training(tmp_path, 1.0)
    training.model.change = lambda loss, model: (
        loss + 1e25 * (model.heads["speech"].weight.sum())
    )
    before = training.content()
    assert training.step() == float("inf")
    assert differs(before, training.content()) == ""
    assert training.state.skipped == 1 and training.scaler.get_scale() == 1.0


# --- Which precision, and which scale -----------------------------------------------


@pytest.mark.second_env
@pytest.mark.parametrize(
    ("words", "gpu", "dtype"),
    [  # gpu: None for a CPU, else whether it computes in bfloat16
        ("--use_amp false", True, None),
        ("--use_amp true", None, None),
        ("--use_amp true", True, torch.bfloat16),
        ("--use_amp true", False, torch.float16),
        ("--use_amp true --amp_dtype float16", True, torch.float16),
        ("--use_amp true --amp_dtype bfloat16", None, torch.bfloat16),
        (
            "--use_amp true --amp_dtype bfloat16",
            False,
            "Old GPU does not compute",
        ),
        ("--amp_dtype bfloat16", True, "needs --use_amp true"),
        ("--use_amp true --train_dtype float64", True, "--train_dtype float64"),
    ],
)
def test_precision_and_scaler(
    words: str,
    gpu: bool | None,
    dtype: torch.dtype | str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Only float16 has a scale; ESPnet's own trainer gives bfloat16 65 536 as well."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    cmd = [*words.split(), "--output_dir", "exp", "--ngpu", str(int(gpu is not None))]
    args = SpearTask.get_parser().parse_args(cmd)
    if isinstance(dtype, str):
        with pytest.raises(ValueError, match=dtype):
            SpearTrainer.build_options(args)
        return
    options = SpearTrainer.build_options(args)
    assert options.product_dtype == dtype
    scaler = options.grad_scaler()
    assert (scaler is not None) == (dtype == torch.float16)
    assert scaler is None or scaler.state_dict()["scale"] == 1.0
    ineffective = gpu is None and dtype is None
    assert ("no effect on a CPU" in caplog.text) == ineffective


@pytest.mark.parametrize(
    ("scale", "normalize"), [(None, "sum"), (4.0, "sum"), (4.0, "frames")]
)
def test_penalties_of_the_network_know_the_scale(
    tmp_path: Path, scale: float | None, normalize: str
) -> None:
    """They are added to gradients of the loss, which is scaled and perhaps a mean."""
    training = Training(tmp_path, scale)
    count = BatchCount()
    training.model.schedule = BatchCountState(count)  # as the task makes it
    model = training.model.model
    model.normalize = normalize
    training.step()
    _, _, frames = model(utt_id=["u", "v"], **make_batch(0))
    expected = (scale or 1.0) / (frames if normalize == "frames" else 1.0)
    assert count.loss_scale == pytest.approx(float(expected), rel=0.1)


@pytest.mark.second_env
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_training_in_low_precision(tmp_path: Path, dtype: str) -> None:
    """Through ESPnet's task, on a CPU."""
    cmd = options(write_data(tmp_path / "data", utts=4), tmp_path / "exp")
    cmd += ["--use_amp", "true", "--amp_dtype", dtype, "--max_epoch", "1"]
    log = tmp_path / "log"
    assert train(cmd, log) == 0, log.read_text()
    state = torch.load(tmp_path / "exp/checkpoint.pth", weights_only=True)
    assert state["reporter"]["stats"][1]["train"]["loss_scale"] == 1.0
    if dtype == "float16":
        assert state["scaler"]["scale"] == 1.0
    else:
        assert state["scaler"] is None
    for value in state["model"].values():
        assert value.dtype == torch.float32 and value.isfinite().all()

"""Steps whose gradients overflow at the loss scale of float16 training."""

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
from tiny_training import differs
from torch import nn

from espnet2_spear.optimizers.scaled_adam import ScaledAdam
from espnet2_spear.train.batches import Window
from espnet2_spear.train.model_average import RunningAverage
from espnet2_spear.train.run_state import RunState
from espnet2_spear.train.step import (
    MIN_LOSS_SCALE,
    SKIPPED,
    OptimizerStep,
    TrainingError,
)

pytestmark = pytest.mark.second_env
# Makes of the loss what a test wants; the gradients are real.
Change = Callable[[torch.Tensor, nn.Module], torch.Tensor]


class Half(nn.Module):
    """The model with products in float16, as on a GPU without bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build(False)
        self.change: Change = lambda loss, model: loss

    def forward(self, utt_id: list[str], **batch: torch.Tensor) -> tuple:
        with torch.autocast("cpu", torch.float16):
            loss, stats, weight = self.model(utt_id=utt_id, **batch)
        return self.change(loss, self.model), stats, weight


class Training:
    """Optimizer steps with a scaler, as the trainer does them."""

    def __init__(
        self,
        folder: Path,
        scale: float,
        optim: str = "scaledadam",
        enabled: bool = True,
    ) -> None:
        self.model = Half()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = (
            ScaledAdam(parameters, lr=0.02)
            if optim == "scaledadam"
            else torch.optim.AdamW(parameters, lr=0.002, fused=True)
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=enabled)
        self.state = RunState(
            folder,
            self.model,
            [self.optimizer],
            [None],
            RunningAverage(0),
            accum_grad=1,
        )
        self.options = SimpleNamespace(
            seed=0,
            use_amp=False,  # Half has it on
            grad_noise=False,
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
            False,
        )
        with reporter.observe("train") as sub:
            step = OptimizerStep(
                self.model,
                [self.optimizer],
                [None],
                self.scaler,
                sub,
                self.options,
                torch.device("cpu"),
                self.state,
            )
            return step(window, 0.0).grad_norm

    def content(self) -> dict:
        """Parameters and what the optimizer remembers of them."""
        return copy.deepcopy(
            {"model": self.model.state_dict(), "optim": self.optimizer.state_dict()}
        )


@pytest.mark.parametrize("optim", ["scaledadam", "adamw"])
@pytest.mark.parametrize("batches", [1, 2])
def test_overflow_lowers_the_scale_until_steps_are_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, optim: str, batches: int
) -> None:
    caplog.set_level(logging.INFO)
    scale, overflows, norms = 2.0**21, 0, []
    training = Training(tmp_path, scale, optim)
    while len(norms) < overflows + 3:
        before = training.content()
        norms.append(training.step(batches))
        done = torch.tensor(norms[-1]).isfinite()
        assert (differs(before, training.content()) != "") == done
        scale *= 1.0 if done else 0.5
        overflows += not done
        assert training.scaler.get_scale() == scale
    # It did overflow, more often than steps may be skipped, and then no more.
    assert training.options.max_skipped_steps < overflows
    assert all(torch.tensor(norms[overflows:]).isfinite())
    assert caplog.text.count("gradients overflow at loss scale") == overflows
    assert training.state.skipped == 0 and not (tmp_path / SKIPPED).exists()
    assert training.state.any_valid
    # The gradients are those without a scaler.
    torch.manual_seed(0)
    other = Training(tmp_path, 1.0, optim, enabled=False)
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


@pytest.mark.parametrize("enabled", [True, False])
def test_a_bad_loss_is_a_fault_of_the_data_not_of_the_scale(
    tmp_path: Path, enabled: bool
) -> None:
    """Whatever its gradients are, and although a disabled scaler is one, too."""
    changes = [
        lambda loss, model: loss * float("nan"),
        lambda loss, model: loss + float("inf"),  # whose gradients are finite
    ]
    training = Training(tmp_path, 16.0, enabled=enabled)
    before = training.content()
    for count, change in enumerate(changes, 1):
        training.model.change = change
        training.step()
        assert training.state.skipped == count
        assert training.scaler.get_scale() == (16.0 if enabled else 1.0)
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

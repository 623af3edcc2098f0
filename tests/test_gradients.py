"""Gradients over accumulated batches, and the running average of the model."""

import contextlib

import pytest
import torch

from espnet2_spear.bin import spear_average
from espnet2_spear.errors import UserError
from espnet2_spear.train.average import (
    RunningAverage,
    average_between,
    average_file,
    save_epoch_average,
)
from espnet2_spear.train.gradients import accumulate_gradients


class MeanSquares(torch.nn.Module):
    """Mean over rows, weighted by their number, as the real model's loss is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(5, 3).double()

    def forward(self, x):
        loss = self.linear(x).square().mean(dim=-1).mean()
        stats = {"loss": loss.detach(), "absent": torch.tensor(float("nan"))}
        return loss, stats, torch.tensor(float(len(x)))


def gradients(model, batches):
    model.zero_grad()
    results, _ = accumulate_gradients(
        model,
        [{"x": b} for b in batches],
        [{"rows": len(b)} for b in batches],
        contextlib.nullcontext,
        lambda loss: loss.backward(),
        lambda index: None,
    )
    return [p.grad.clone() for p in model.parameters()], results


def test_mean_over_unequal_batches_is_that_of_one_big_batch():
    model = MeanSquares()
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(1)).double()
    expected, _ = gradients(model, [x])
    accumulated, results = gradients(model, [x[:2], x[2:15], x[15:]])
    for a, b in zip(expected, accumulated, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for name in ("weight", "rows"):
        assert [float(result.sums[name]) for result in results] == [2, 13, 5]
    # The mean of means, which it is not.
    parts = [gradients(model, [b])[0][0] for b in (x[:2], x[2:15], x[15:])]
    assert (sum(parts) / 3 - expected[0]).abs().max() > 1e-3


def test_running_average_between_two_epochs(tmp_path):
    model = MeanSquares().float()
    model.register_buffer("count", torch.tensor(7))
    average, samples, epochs = RunningAverage(2), [], {}
    generator = torch.Generator().manual_seed(2)
    for steps in range(1, 41):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        average.after_step(model, steps)
        if steps % 2 == 0:
            samples.append(model.linear.weight.detach().double().clone())
        if steps % 10 == 0:
            save_epoch_average(average, model, tmp_path, steps // 10, keep=3)
            epochs[steps // 10] = len(samples)
    for first, last in ((0, 4), (2, 4), (3, 4), (2, 3)):
        state = average_between(tmp_path, first, last)
        begin = epochs.get(first, 0)
        expected = torch.stack(samples[begin : epochs[last]]).mean(dim=0)
        torch.testing.assert_close(
            state["linear.weight"], expected.float(), rtol=1e-6, atol=1e-7
        )
        assert set(state) == set(model.state_dict()) and int(state["count"]) == 7
    assert not average_file(tmp_path, 1).exists()
    with pytest.raises(UserError, match=r"running average: \[2, 3, 4\]"):
        average_between(tmp_path, 1, 4)
    with pytest.raises(UserError, match="before the last"):
        average_between(tmp_path, 4, 4)
    # A restored average goes on as the one it was saved from.
    other = RunningAverage(2)
    other.load_state_dict(average.state_dict())
    with torch.no_grad():
        model.linear.weight.add_(1.0)
    for one in (average, other):
        one.after_step(model, 42)
    one, two = (a.state_dict()["mean"]["linear.weight"] for a in (average, other))
    assert torch.equal(one, two)


def test_average_command(tmp_path):
    model, average = MeanSquares().float(), RunningAverage(1)
    average.after_step(model, 1)
    save_epoch_average(average, model, tmp_path, 1, keep=3)
    command = ["--exp", str(tmp_path), "--from_epoch", "0", "--to_epoch"]
    spear_average.main([*command, "1"])
    state = torch.load(tmp_path / "average_0_1.pth", weights_only=True)
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value)
    with pytest.raises(UserError, match=r"Epochs with a running average: \[1\]"):
        spear_average.main([*command, "2"])

"""ScaledAdam and Eden against reference trajectories."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from espnet2_spear.optimizers import scaled_adam
from espnet2_spear.optimizers.scaled_adam import ScaledAdam, check_lr_scale, scale_lr
from espnet2_spear.schedulers.eden import Eden, eden_factor

NAMES = ("w", "w2", "b", "s")


class Problem:
    """The reference's regression problem with four parameters."""

    def __init__(self, ref, named: bool = False) -> None:
        self.ref = ref
        self.params = {
            n: torch.nn.Parameter(torch.tensor(ref[f"init_{n}"])) for n in NAMES
        }
        params = self.params.items() if named else self.params.values()
        scale = float(ref["clipping_scale"])
        self.opt = ScaledAdam(params, lr=float(ref["lr"]), clipping_scale=scale)

    def loss(self, t: int) -> torch.Tensor:
        p = self.params
        x, y = torch.tensor(self.ref["X"][t]), torch.tensor(self.ref["Y"][t])
        out = p["s"] * (x @ (p["w"] + p["w2"]).T + p["b"])
        return (out - y).square().sum() * (50 if t % 37 == 0 else 1)

    def step(self, t: int, scale: float = 1.0) -> None:
        self.opt.zero_grad()
        (self.loss(t) * scale).backward()
        self.opt.step()

    def error(self, t: int) -> float:
        return max(
            np.abs(p.detach().numpy() - self.ref[f"traj_{n}"][t]).max()
            for n, p in self.params.items()
        )


@pytest.mark.parametrize(
    "folder, named", [("data_dir", False), ("data_dir", True), ("golden_dir", False)]
)
def test_scaled_adam_follows_reference(
    request: pytest.FixtureRequest, folder: str, named: bool
) -> None:
    path = request.getfixturevalue(folder) / "scaled_adam.npz"
    problem = Problem(np.load(path), named)
    for t in range(len(problem.ref["X"])):
        problem.step(t)
        assert problem.error(t) < 1e-4, t


def test_scaled_adam_ignores_the_scale_of_the_loss(data_dir: Path) -> None:
    ref = np.load(data_dir / "scaled_adam.npz")
    a, b = Problem(ref), Problem(ref)
    for t in range(110):
        a.step(t)
        b.step(t, scale=1024.0)
    for n in NAMES:
        torch.testing.assert_close(a.params[n], b.params[n], rtol=1e-4, atol=1e-5)


def test_scaled_adam_resumes_exactly(data_dir: Path, tmp_path: Path) -> None:
    ref = np.load(data_dir / "scaled_adam.npz")
    whole, first = Problem(ref), Problem(ref)
    for t in range(120):
        whole.step(t)
        if t < 105:
            first.step(t)
    torch.save(first.opt.state_dict(), tmp_path / "opt.pth")
    second = Problem(ref)
    second.opt.load_state_dict(torch.load(tmp_path / "opt.pth", weights_only=True))
    for n in NAMES:
        second.params[n].data.copy_(first.params[n].data)
    for t in range(105, 120):
        second.step(t)
    for n in NAMES:
        assert torch.equal(whole.params[n], second.params[n])


def test_scaled_adam_clips_when_first_parameter_has_no_gradient() -> None:
    first, second = (torch.nn.Parameter(torch.ones(n)) for n in (2, 3))
    opt = ScaledAdam([first, second], lr=0.01)
    for t in range(155):
        opt.zero_grad()
        used = second.square().sum() + (first.square().sum() if t < 150 else 0)
        (used * (1e6 if t == 154 else 1)).backward()
        before = opt.state[second].get("exp_avg_sq", torch.zeros(3)).clone()
        opt.step()
    added = opt.state[second]["exp_avg_sq"] - 0.98 * before
    norm = opt.state[second]["param_rms"] * (added / 0.02).sum().sqrt()
    assert norm <= 1.01 * opt.state[first]["model_norm_threshold"]


def test_scaled_adam_follows_freezing_and_new_groups(tmp_path: Path) -> None:
    """Parameters join and leave stacks in mid-training, and a resume agrees."""
    torch.manual_seed(0)
    start = [torch.randn(4) for _ in range(3)]

    def make() -> tuple[list[torch.nn.Parameter], ScaledAdam]:
        params = [torch.nn.Parameter(x.clone()) for x in start]
        return params, ScaledAdam(params[:2], lr=0.02)

    def run(params, opt: ScaledAdam, steps: int) -> None:
        for _ in range(steps):
            opt.zero_grad()
            sum((p - 3).square().sum() for p in params if p.requires_grad).backward()
            opt.step()

    params, opt = make()
    params[1].requires_grad = False
    run(params, opt, 5)
    assert torch.equal(params[1], start[1]) and not torch.equal(params[0], start[0])
    params[1].requires_grad = True
    run(params, opt, 5)
    assert not torch.equal(params[1], start[1])
    params[0].requires_grad = False
    kept = params[0].detach().clone()
    opt.add_param_group({"params": [params[2]]})
    run(params, opt, 5)
    assert torch.equal(params[0], kept) and not torch.equal(params[2], start[2])

    others, resumed = make()
    others[0].requires_grad = False
    resumed.add_param_group({"params": [others[2]]})
    for p, other in zip(params, others, strict=True):
        other.data.copy_(p)
    torch.save(opt.state_dict(), tmp_path / "opt.pth")
    resumed.load_state_dict(torch.load(tmp_path / "opt.pth", weights_only=True))
    for sides in ((params, opt), (others, resumed)):
        sides[0][0].requires_grad = True
        run(*sides, 5)
    for p, other in zip(params, others, strict=True):
        assert torch.equal(p, other)


def test_scaled_adam_can_be_copied(data_dir: Path) -> None:
    problem = Problem(dict(np.load(data_dir / "scaled_adam.npz")))
    for t in range(5):
        problem.step(t)
    twin = copy.deepcopy(problem)
    problem.step(5)
    assert problem.error(5) < 1e-4 < twin.error(5)
    twin.step(5)
    assert twin.error(5) < 1e-4


def test_eden_follows_reference(data_dir: Path) -> None:
    ref = np.load(data_dir / "eden.npz")
    for epoch, batch, lr in ref["rows"]:
        got = float(ref["base_lr"]) * eden_factor(
            batch,
            epoch,
            float(ref["lr_batches"]),
            float(ref["lr_epochs"]),
            float(ref["warmup_batches"]),
            0.5,
        )
        assert got == pytest.approx(lr, rel=1e-6)


def test_eden_steps_and_resumes() -> None:
    def make() -> Eden:
        p = torch.nn.Parameter(torch.ones(2))
        return Eden(ScaledAdam([p], lr=0.045), lr_hours=10.0, hours_per_batch=0.1)

    whole, second = make(), make()
    for _ in range(300):
        whole.step()
        if whole.last_epoch == 200:
            second.load_state_dict(whole.state_dict())
    for _ in range(100):
        second.step()
    expected = 0.045 * eden_factor(300, 30.0, 7500, 10.0, 500, 0.5)
    assert whole.get_last_lr() == second.get_last_lr() == [pytest.approx(expected)]
    assert type(whole.get_last_lr()[0]) is float


def test_eden_counts_the_hours_that_it_is_told() -> None:
    """Batches of unequal length, and a resume between them."""

    def make(hours_per_batch: float | None = None) -> Eden:
        p = torch.nn.Parameter(torch.ones(2))
        opt = ScaledAdam([p], lr=0.045)
        return Eden(opt, lr_hours=2.0, hours_per_batch=hours_per_batch)

    whole, second, constant = make(), make(), make(0.25)
    for step in range(60):
        seconds = 400.0 + 10 * (step % 7)
        if step == 30:
            second.load_state_dict(whole.state_dict())
        for eden in (whole, second, constant)[:: 1 if step >= 30 else 2]:
            eden.count_audio(seconds)
            eden.step()
    hours = sum(400.0 + 10 * (step % 7) for step in range(60)) / 3600
    expected = 0.045 * eden_factor(60, hours, 7500, 2.0, 500, 0.5)
    assert whole.get_last_lr() == second.get_last_lr() == [pytest.approx(expected)]
    expected = 0.045 * eden_factor(60, 15.0, 7500, 2.0, 500, 0.5)
    assert constant.get_last_lr() == [pytest.approx(expected)]
    with pytest.raises(RuntimeError, match="nobody counts"):
        make().step()


def test_eden_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="lr_batches"):
        Eden(ScaledAdam([torch.nn.Parameter(torch.ones(2))]), lr_batches=0)


class _NoReadback(TorchDispatchMode):
    """Fails when the value of a tensor is asked for: on a GPU, one waits for that."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_scaled_adam_reads_nothing_back() -> None:
    params = [torch.nn.Parameter(torch.randn(3, 2)) for _ in range(2)]
    params += [torch.nn.Parameter(torch.tensor(1.0))]
    opt = ScaledAdam(params, lr=0.01)
    for _ in range(203):  # past two updates of the threshold
        for p in params:
            p.grad = torch.randn_like(p)
        with _NoReadback():
            opt.step()
    assert "model_norm_threshold" in opt.state[params[0]]


def test_scaled_adam_updates_large_tensors_in_blocks() -> None:
    """As the stack of them would be, whatever the layout of the gradients."""
    torch.manual_seed(0)
    start = torch.randn(2, 300, 250)  # 75000 elements, more than one block
    trained = []
    for small_blocks in (False, True):
        params = [torch.nn.Parameter(x.clone()) for x in start]
        opt = ScaledAdam(params, lr=0.03)
        generator = torch.Generator().manual_seed(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scaled_adam, "_BLOCK", 4096 if small_blocks else 1 << 30)
            for _ in range(105):
                for p in params:
                    grad = torch.randn(250, 300, generator=generator)
                    p.grad = grad.T + 0.1 * p.detach()
                opt.step()
        assert not torch.equal(params[0], start[0])
        trained.append(params)
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("finite", [False, True])
def test_scaled_adam_with_a_gradient_scaler(data_dir: Path, finite: bool) -> None:
    """Gradients are unscaled before clipping; a step with infinite ones is skipped."""
    ref = np.load(data_dir / "scaled_adam.npz")
    plain, scaled = Problem(ref), Problem(ref)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for t in range(8):
        plain.step(t)
        p = scaled.params
        for overflow in (False,) if finite else (True, False):
            scaled.opt.zero_grad()
            scaler.scale(scaled.loss(t)).backward()
            if overflow:
                p["w"].grad[0, 0] = float("inf")
            before = [q.detach().clone() for q in p.values()]
            scaler.step(scaled.opt)
            scaler.update()
            if overflow:
                for q, b in zip(p.values(), before, strict=True):
                    assert torch.equal(q, b)
    for n in NAMES:
        torch.testing.assert_close(scaled.params[n], plain.params[n])
    assert scaler.get_scale() == 2.0 ** (12 if finite else 4)


def test_parts_learn_at_their_own_rate():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    scale_lr(model[0], 0.05)
    with pytest.raises(ValueError, match="is for `optim: scaledadam`"):
        check_lr_scale(model[0], "frontend spear")
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = ScaledAdam(model.parameters(), lr=0.04)
    check_lr_scale(model[0], "frontend spear")
    check_lr_scale(model[1], "frontend spear")
    scheduler = Eden(optimizer, warmup_start=0.5)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.001, 0.02])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    scheduler.step()
    sizes = [b.square().mean().sqrt() for b in before]
    steps = [
        ((p - b).abs().mean() / size).item()
        for p, b, size in zip(model.parameters(), before, sizes, strict=True)
    ]
    assert steps[2] == pytest.approx(20 * steps[0], rel=1e-3)
    assert steps[3] == pytest.approx(20 * steps[1], rel=1e-3)
    again = ScaledAdam(model.named_parameters(), lr=0.04)
    again.load_state_dict(optimizer.state_dict())
    assert [len(g["params"]) for g in again.param_groups] == [2, 2]
    with pytest.raises(ValueError, match="must be positive"):
        scale_lr(model, 0.0)


def test_each_group_is_clipped_by_its_own_norms() -> None:
    """As if it had an optimizer of its own, whatever happens in the other group."""

    def run(names: str) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        params = {n: torch.nn.Parameter(torch.ones(6)) for n in "ab"}
        scale_lr(torch.nn.ParameterList([params["b"]]), 0.1)
        opt = ScaledAdam([params[n] for n in names], lr=0.01)
        for step in range(130):
            for n in "ab":
                grad = torch.randn(6, generator=generator)
                # Outliers in group b alone, from the first threshold on.
                params[n].grad = grad * (1e4 if n == "b" and step > 110 else 1.0)
            opt.step()
        return params

    together, alone = run("ab"), {n: run(n)[n] for n in "ab"}
    for n in "ab":
        assert torch.equal(together[n], alone[n])


# --- Parameters that start as zeros ---------------------------------------------------


def learn_layer_weights(make, start: float, steps: int) -> float:
    """Weight of the one useful layer of 12 after so many steps."""
    generator = torch.Generator().manual_seed(0)
    useful = torch.randn(32, generator=generator)
    weights = torch.nn.Parameter(torch.full((12,), start))
    other = torch.nn.Parameter(torch.ones(3))
    optimizer = make([weights, other])
    for _ in range(steps):
        layers = torch.randn(12, 32, generator=generator)
        layers[7] = useful
        out = (weights.softmax(0)[:, None] * layers).sum(0)
        optimizer.zero_grad()
        ((out - useful).square().mean() + (other - 1).square().sum()).backward()
        optimizer.step()
    return float(weights.detach().softmax(0)[7])


@pytest.mark.parametrize("start, lr, steps", [(0.0, 0.02, 600), (1.0, 0.002, 4000)])
def test_weights_of_layers_learn_as_under_adam(start: float, lr: float, steps: int):
    """From zeros, as s3prl's, and from ones, as those of frontend ``spear``."""

    def learned(make, **options) -> float:
        return learn_layer_weights(lambda p: make(p, lr=lr, **options), start, steps)

    assert learned(torch.optim.Adam) > 0.9 and learned(ScaledAdam) > 0.9
    if start == 0:  # what the reference does
        assert learned(ScaledAdam, zero_rms=1e-5) == pytest.approx(1 / 12, abs=0.01)


def test_low_rank_adapters_learn() -> None:
    """LoRA: of the product B A, B starts as zeros."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(s, generator=generator) for s in ((8, 2), (2, 8)))
    target = left @ right / 4
    errors = []
    for zero_rms in (0.1, 1e-5):
        a = torch.nn.Parameter(torch.randn(2, 8, generator=generator) / 3)
        b = torch.nn.Parameter(torch.zeros(8, 2))
        optimizer = ScaledAdam([a, b], lr=0.005, zero_rms=zero_rms)
        for _ in range(600):
            optimizer.zero_grad()
            (b @ a - target).square().sum().backward()
            optimizer.step()
        errors.append(float((b @ a - target).detach().norm() / target.norm()))
    assert errors[0] < 0.2 and errors[1] > 0.9

"""The chunked loss of the heads against the plain one."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from espnet2_spear.spear.objective import CodebookHead, codebook_loss

M, D, N, K = 23, 6, 3, 4


def plain(hidden, weight, bias, targets, frame_weight):
    """The same by PyTorch, all logits at once."""
    logits = F.linear(hidden, weight, bias).unflatten(-1, (targets.size(1), -1))
    entropy = F.cross_entropy(
        logits.flatten(0, 1),
        targets.clamp(min=-1).flatten(),
        ignore_index=-1,
        reduction="none",
    ).view(targets.shape)
    return (entropy.mean(dim=1) * frame_weight).sum(), entropy, logits.argmax(-1)


def example(dtype=torch.float64, m=M, d=D, n=N, k=K):
    torch.manual_seed(0)
    hidden = torch.randn(m, d, dtype=dtype, requires_grad=True)
    weight = torch.randn(n * k, d, dtype=dtype, requires_grad=True)
    bias = torch.randn(n * k, dtype=dtype, requires_grad=True)
    targets = torch.randint(k, (m, n))
    targets[torch.rand(m, n) < 0.2] = -1
    targets[3:9] = -100  # frames without any target
    frame_weight = torch.rand(m, dtype=dtype)
    frame_weight[10:12] = 0.0
    return hidden, weight, bias, targets, frame_weight


def gradients(loss, inputs):
    return torch.autograd.grad(loss * 0.37, inputs)


@pytest.mark.parametrize("rows", [1, 5, M, 100])
def test_equals_the_plain_loss(rows: int) -> None:
    inputs = example()
    got = codebook_loss(*inputs, chunk_rows=rows)
    loss, entropy, best = plain(*inputs)
    torch.testing.assert_close(got.loss, loss)
    torch.testing.assert_close(got.entropy, entropy.detach())
    assert (got.correct == (best == inputs[3])).all()
    assert not got.entropy.requires_grad
    for a, b in zip(
        gradients(got.loss, inputs[:3]), gradients(loss, inputs[:3]), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_gradient_by_finite_differences() -> None:
    *inputs, targets, frame_weight = example(m=7)
    assert torch.autograd.gradcheck(
        lambda *x: codebook_loss(*x, targets, frame_weight, chunk_rows=3).loss, inputs
    )


def test_backward_twice_gives_the_gradient_twice() -> None:
    inputs = example()
    loss = codebook_loss(*inputs).loss
    loss.backward(retain_graph=True)
    once = inputs[1].grad.clone()
    loss.backward()
    torch.testing.assert_close(inputs[1].grad, 2 * once)


@pytest.mark.parametrize("name", ["data_dir", "golden_dir"])
def test_reference_outputs(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    ref = np.load(folder / "codebook_loss.npz")
    x, targets = torch.tensor(ref["x"]), torch.tensor(ref["idx"])
    b, t, n = targets.shape
    weight, bias = torch.tensor(ref["weight"]).flatten(0, 1), torch.tensor(ref["bias"])
    got = codebook_loss(
        x.flatten(0, 1),
        weight,
        bias.flatten(),
        targets.flatten(0, 1),
        torch.ones(b * t),
        chunk_rows=13,
    )
    np.testing.assert_allclose(got.entropy.view(b, t, n), ref["per_entry"], atol=1e-4)
    if "utt" in ref:
        # Ignored entries count in the mean over codebooks.
        np.testing.assert_allclose(got.loss, ref["utt"].sum(), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_all_of_it_is_float32_under_autocast(dtype: torch.dtype, scale: float) -> None:
    """Also with weights of frames that would vanish in float16."""
    *inputs, frame_weight = example(torch.float32, m=400, d=32, n=4, k=16)
    inputs = *inputs, scale * frame_weight
    expected = codebook_loss(*inputs, chunk_rows=64)
    with torch.autocast("cpu", dtype=dtype):
        got = codebook_loss(*inputs, chunk_rows=64)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(
        *(gradients(x.loss, inputs[:3]) for x in (got, expected)), strict=True
    ):
        assert torch.equal(a, b) and a.abs().max() > 0


def test_hidden_frames_in_bfloat16() -> None:
    """Of a student under autocast: its rounding is the only one."""
    hidden, *others = example(torch.float32, m=400, d=32, n=4, k=16)
    rounded = hidden.detach().bfloat16().requires_grad_()
    exact = rounded.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = codebook_loss(rounded, *others)
    expected = codebook_loss(exact, *others)
    assert torch.equal(got.entropy, expected.entropy)
    a, b = gradients(got.loss, [rounded])[0], gradients(expected.loss, [exact])[0]
    assert torch.equal(a, b.bfloat16())


@pytest.mark.parametrize("case", ["no target", "no weight"])
def test_no_target_gives_zero_gradients(case: str) -> None:
    hidden, weight, bias, targets, frame_weight = example()
    if case == "no target":
        targets.fill_(-1)
    else:
        frame_weight.zero_()
    got = codebook_loss(hidden, weight, bias, targets, frame_weight)
    got.loss.backward()
    assert got.loss == 0.0
    for x in (hidden, weight, bias):
        assert (x.grad == 0).all()


def test_extreme_logits_stay_finite() -> None:
    hidden, weight, bias, targets, frame_weight = example(torch.float32)
    with torch.no_grad():
        weight *= 1e4
    got = codebook_loss(hidden, weight, bias, targets, frame_weight)
    got.loss.backward()
    assert got.loss.isfinite() and weight.grad.isfinite().all()


def test_keeps_no_logits() -> None:
    """What autograd keeps does not grow with the codebooks."""

    def kept(n: int) -> int:
        inputs = example(torch.float32, m=200, d=16, n=n, k=64)
        sizes = []

        def pack(x):
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            codebook_loss(*inputs)
        return sum(sizes) - inputs[1].numel() - inputs[2].numel()

    assert kept(2) == kept(16) <= 200 * 16 + 10


def test_nothing_is_kept_without_gradients() -> None:
    inputs = example()
    with torch.no_grad():
        got = codebook_loss(*inputs)
    assert not got.loss.requires_grad
    torch.testing.assert_close(got.loss, plain(*inputs)[0].detach())


def test_sizes_are_checked() -> None:
    hidden, weight, bias, targets, frame_weight = example()
    with pytest.raises(ValueError, match="do not fit together"):
        codebook_loss(hidden, weight[:-1], bias[:-1], targets, frame_weight)
    with pytest.raises(ValueError, match="do not fit together"):
        codebook_loss(hidden[1:], weight, bias, targets, frame_weight)


def test_head_under_compile() -> None:
    """Compiled code breaks its graph at the loss and goes on behind it."""
    torch.manual_seed(0)
    head = CodebookHead(D, N, K)
    hidden, *_, targets, frame_weight = example(torch.float32)

    def step(hidden, targets, frame_weight):
        out = head(hidden * 2.0, targets, frame_weight)
        return out.loss + 1.0, out.correct.float().mean()

    expected = step(hidden, targets, frame_weight)
    got = torch.compile(step, backend="eager")(hidden, targets, frame_weight)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(x[0], head.weight)[0] for x in (got, expected)]
    torch.testing.assert_close(*grads)
    assert head.logits(hidden).shape == (M, N, K)

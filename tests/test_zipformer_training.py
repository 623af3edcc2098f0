"""What shapes training: gradients, statistics, schedules, and their survival."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from espnet2.main_funcs.average_nbest_models import average_nbest_models
from espnet2.train.reporter import Reporter
from test_zipformer_exact import NARROW

from espnet2_spear.optimizers.scaled_adam import ScaledAdam
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer import (
    attention,
    conv_embed,
    cpu,
    layer,
    regularizers,
    scaling,
)
from espnet2_spear.zipformer.attention import AttentionWeights
from espnet2_spear.zipformer.config import ZipformerConfig
from espnet2_spear.zipformer.conv_embed import ConvEmbed
from espnet2_spear.zipformer.encoder import layer_skip
from espnet2_spear.zipformer.frames import Frames
from espnet2_spear.zipformer.layer import ZipformerLayer
from espnet2_spear.zipformer.regularizers import (
    Balancer,
    SharedDropout,
    Whiten,
    limit_parameter,
    penalize_large,
    scale_grad,
    sequence_mask,
    whitening_metric,
)
from espnet2_spear.zipformer.scaling import BiasNorm, Bypass
from espnet2_spear.zipformer.schedule import (
    SCHEDULES_END,
    BatchCount,
    BatchCountState,
)

REGULARIZED = replace(NARROW, regularize=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)


def grad_of(function, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Gradient that reaches x, given the one at the function's output."""
    x = x.clone().requires_grad_()
    y = function(x)
    assert torch.equal(y, x)  # the identity, forward
    y.backward(grad)
    return x.grad


def test_schedules_are_piecewise_linear() -> None:
    count = BatchCount()
    points = ((0, 0.2), (4000, 0.05), (16000, 0.0))
    for batches, value in [
        (0, 0.2),
        (2000, 0.125),
        (4000, 0.05),
        (10000, 0.025),
        (16000, 0.0),
        (1e9, 0.0),
    ]:
        count.value = batches
        assert count.at(points) == pytest.approx(value)
        assert count.at(0.7) == 0.7


@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_balancer_adds_the_gradient_of_its_penalty(channel_dim: int) -> None:
    scale = torch.tensor([0.01, 1.0, 1.0, 30.0, 1.0, 0.0])
    shift = torch.tensor([0.0, 3.0, -3.0, 1.0, 0.0, 0.0])
    x = torch.randn(4, 50, 6) * scale + shift
    grad = torch.randn(4, 50, 6)
    low, high, small, large = 0.4, 0.6, 0.2, 4.0
    balancer = Balancer(BatchCount(), low, high, small, large, prob=1.0)
    balancer.channel_dim = channel_dim
    if channel_dim == 1:
        got = grad_of(balancer, x.transpose(1, 2), grad.transpose(1, 2))
        got = got.transpose(1, 2)
    else:
        got = grad_of(balancer, x, grad)

    y = x.clone().requires_grad_()
    mean, square = y.mean((0, 1)), y.square().mean((0, 1))
    ratio = mean / (square - mean.square()).clamp(min=1e-20).sqrt()
    rms = square.clamp(min=1e-20).sqrt()
    # tanh(ratio / 0.8139...) = 2 share - 1 approximates the normal distribution.
    bound = 0.8139535143 * torch.atanh(torch.tensor(2 * high - 1))
    to_rms = (torch.pi / 2) ** 0.5
    penalty = (ratio - ratio.clamp(-bound, bound)).abs()
    penalty += (rms.clamp(small * to_rms, large * to_rms) / rms).log().abs()
    penalty.sum().backward()
    size = y.grad.square().mean((0, 1)).sqrt().clamp(min=1e-20)
    expected = grad + grad.abs() * y.grad * (0.04 / size)
    torch.testing.assert_close(got[..., :5], expected[..., :5], rtol=1e-4, atol=1e-5)
    assert torch.equal(got[..., 4], grad[..., 4])  # within all limits
    assert not torch.equal(got[..., 0], grad[..., 0])
    assert torch.isfinite(got).all()  # a channel of zeros included


def test_balancer_bears_channels_that_hardly_vary() -> None:
    x = 1.0 + 1e-5 * torch.randn(50, 3)
    grad = torch.randn(50, 3)
    added = grad_of(Balancer(BatchCount(), prob=1.0), x, grad) - grad
    assert added.abs().max() < 0.5 * grad.abs().max() and added.abs().max() > 0


def test_balancer_is_sampled_and_absent_in_eval() -> None:
    count = BatchCount()
    balancer = Balancer(count, max_abs=0.01)
    x, grad = torch.randn(5, 4), torch.randn(5, 4)

    def share() -> float:
        return sum(
            not torch.equal(grad_of(balancer, x, grad), grad) for _ in range(400)
        ) / (400)

    assert 0.43 < share() < 0.57
    count.value = 8000
    assert 0.08 < share() < 0.18
    balancer.eval()
    assert share() == 0


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call is checked by Whiten."""
    for module in (regularizers, cpu):
        monkeypatch.setattr(module, "WHITEN_PROB", (1.0, 1.5))


def test_whitening_adds_the_gradient_of_the_metric(always: None) -> None:
    mixing = torch.randn(6, 6)
    x, grad = torch.randn(2, 80, 6) @ mixing + 3.0, torch.randn(2, 80, 6)
    for groups in (1, 2):
        whiten = Whiten(BatchCount(), 1.0, groups=groups, grad_scale=0.05)
        added = grad_of(whiten, x, grad) - grad
        y = x.clone().requires_grad_()
        # The definition, one group at a time.
        covars = [g.reshape(-1, 6 // groups).T.cov() for g in y.chunk(groups, -1)]
        covar = torch.block_diag(*covars)
        metric = covar.square().sum() / 6 / (covar.trace() / 6) ** 2
        torch.testing.assert_close(whitening_metric(x, groups)[0], metric.detach())
        metric.backward()
        expected = y.grad * (0.05 * grad.norm() / y.grad.norm())
        torch.testing.assert_close(added, expected, rtol=1e-3, atol=1e-4)
        assert whiten.beyond


def test_whitening_leaves_white_features_alone(always: None) -> None:
    x, grad = torch.randn(4000, 4), torch.randn(4000, 4)
    count = BatchCount()
    whiten = Whiten(count, ((0, 1.2), (100, 0.5)))
    assert torch.equal(grad_of(whiten, x, grad), grad) and not whiten.beyond
    count.value = 100.0  # the limit follows its schedule
    assert not torch.equal(grad_of(whiten, x, grad), grad)
    assert whiten.beyond
    whiten.eval()
    assert torch.equal(grad_of(whiten, x, grad), grad)


def test_whitening_is_checked_more_often_beyond_the_limit() -> None:
    other, grad = torch.randn(50, 2) * torch.tensor([1.0, 9]), torch.ones(50, 2)
    for beyond, wanted in ((False, 0.025), (True, 0.25)):
        checks = 0
        whiten = Whiten(BatchCount(), 1.5)
        for _ in range(1000):
            whiten.prob = wanted  # as a resumed training sets it
            assert whiten.prob == wanted and bool(whiten.beyond) == beyond
            checks += not torch.equal(grad_of(whiten, other, grad), grad)
        assert checks / 1000 == pytest.approx(wanted, abs=0.04 if beyond else 0.015)


def test_gradient_scale_and_penalty() -> None:
    x, grad = torch.tensor([-30.0, -20.0, 0.0, 25.5]), torch.randn(4)
    torch.testing.assert_close(
        grad_of(lambda v: scale_grad(v, 0.2), x, grad), 0.2 * grad
    )
    got = grad_of(lambda v: penalize_large(v, 25.0, 1e-4), x, grad)
    torch.testing.assert_close(got, grad + torch.tensor([-1e-4, 0, 0, 1e-4]))


def test_parameters_are_kept_in_their_range() -> None:
    p = torch.tensor([0.1, 0.1, 0.5, 0.5, 2.0, 2.0])
    grad = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    turned = torch.tensor([-1.0, -1.0, 1.0, -1.0, 1.0, 1.0])
    results = [
        grad_of(lambda v: limit_parameter(v, 0.2, 1.0), p, grad) for _ in range(300)
    ]
    times = sum(torch.equal(r, turned) for r in results)
    assert 150 < times < 210  # 60 %
    assert sum(torch.equal(r, grad) for r in results) == 300 - times


def test_bypass_scale_is_pushed_above_its_scheduled_minimum() -> None:
    count = BatchCount()
    bypass = Bypass(3, count)
    original, x = torch.zeros(1, 1, 3), torch.ones(1, 1, 3)

    def turned() -> bool:
        bypass.zero_grad()
        bypass(original, x).sum().backward()  # wants smaller scales
        return bool((bypass.bypass_scale.grad < 0).all())

    assert 40 < sum(turned() for _ in range(100)) < 80  # 0.5 is below 0.9
    count.value = 20000
    assert sum(turned() for _ in range(50)) == 0  # and above 0.2
    with torch.no_grad():
        bypass.bypass_scale.fill_(0.1)
    assert any(turned() for _ in range(50))
    bypass.eval()
    assert not any(turned() for _ in range(50))


def test_log_scale_is_limited() -> None:
    norm = BiasNorm(4, BatchCount())
    with torch.no_grad():
        norm.log_scale.fill_(1.6)

    def grad() -> float:
        norm.zero_grad()
        norm(torch.ones(1, 4)).sum().neg().backward()  # wants a larger scale
        return norm.log_scale.grad.item()

    signs = [grad() > 0 for _ in range(100)]
    assert 40 < sum(signs) < 80


def test_dropout_drops_channels_of_utterances() -> None:
    count = BatchCount()
    dropout = SharedDropout(count)
    x = torch.ones(400, 3, 50)
    y = dropout(x)
    assert torch.equal(y[:, 0], y[:, 2])  # shared by all frames
    assert (y == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)
    count.value = 20000
    assert (dropout(x) == 0).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert dropout.eval()(x) is x


def test_sequence_masks() -> None:
    mask = sequence_mask(torch.ones(4000, 3, 5, 2), 0.2)
    assert mask.shape == (4000, 1, 1, 1)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.mean().item() == pytest.approx(0.8, abs=0.03)


def make_layer(count: BatchCount | None, skip=0.0) -> ZipformerLayer:
    return ZipformerLayer(NARROW, 0, count, skip)


def make_frames(b: int, t: int) -> Frames:
    pos = attention.encode_positions(t, 48, torch.device("cpu"))
    padding = torch.zeros(b, t, dtype=torch.bool)
    return Frames(padding).with_keys(pos, padding)


def test_layers_and_branches_are_skipped_per_sequence() -> None:
    count = BatchCount()
    skipping = make_layer(count, ((0, 0.5), (4000, 0.05)))
    x, frames = torch.randn(500, 3, 16), make_frames(500, 3)

    def skipped() -> float:
        with torch.no_grad():
            return (skipping(x, frames) == x).all(dim=(1, 2)).float().mean().item()

    assert skipped() == pytest.approx(0.5, abs=0.08)
    count.value = 4000
    assert skipped() == pytest.approx(0.05, abs=0.03)
    skipping.eval()
    assert skipped() == 0
    skipping.train()
    for schedule, shares in [
        (layer.ATTENTION_SKIP, {0: 0.2, 4000: 0.05, 16000: 0}),
        (layer.CONVOLUTION_SKIP, {0: 0.2, 4000: 0.05, 16000: 0}),
        (layer.FEED_FORWARD_SKIP, {0: 0.1, 4000: 0.01, 50000: 0}),
    ]:
        for count.value, share in shares.items():
            keep = skipping._keep(torch.ones(3000, 1, 1), schedule)
            dropped = 0.0 if keep is None else 1 - keep.mean().item()
            assert dropped == pytest.approx(share, abs=0.03)
            assert (keep is None) == (share == 0)


def test_skipped_branches_get_no_gradient() -> None:
    """A sequence's own contribution to a branch's weights vanishes when skipped."""
    count = BatchCount(start=60000.0)
    one = make_layer(count)
    for skipped, module in [
        ("ATTENTION_SKIP", one.self_attn1),
        ("ATTENTION_SKIP", one.nonlin_attention),
        ("CONVOLUTION_SKIP", one.conv_module2),
        ("FEED_FORWARD_SKIP", one.feed_forward2),
    ]:
        for rate, has_gradient in [(0.0, True), (1.0, False)]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(layer, skipped, rate)
                one.zero_grad()
                one(torch.randn(2, 5, 16), make_frames(2, 5)).square().sum().backward()
            grad = module.out_proj.weight.grad
            assert bool(grad.abs().sum() > 0) == has_gradient


def test_deeper_layers_settle_later() -> None:
    base = ZipformerConfig.from_name("base")
    spans = [
        [point[0] for point in layer_skip(stack, i, base)]
        for stack, n in enumerate(base.num_encoder_layers)
        for i in range(n)
    ]
    assert spans[0] == [500.0, 1000.0] and spans[-1] == [3500.0, 4000.0]
    for (_, end), (begin, _) in zip(spans, spans[1:], strict=False):
        assert begin == pytest.approx(end)
    assert [p[1] for p in layer_skip(0, 0, base)] == [0.5, 0.035]
    assert layer_skip(3, 2, base)[1][1] == pytest.approx(0.035 * 8**0.5)


def test_embedding_is_skipped_and_its_first_gradient_scaled() -> None:
    count = BatchCount()
    plain = ConvEmbed(24, 16, (2, 4, 4))
    embedding = ConvEmbed(24, 16, (2, 4, 4), count)
    embedding.load_state_dict(plain.state_dict())
    x = torch.randn(300, 4, 3, 5)
    for count.value, share in [(0.0, 0.2), (20000.0, 0.015)]:
        with torch.no_grad():
            same = (embedding.convnext(x) == x).all(dim=(1, 2, 3)).float().mean()
        assert same.item() == pytest.approx(share, abs=0.07)

    fbank = torch.randn(4, 60, 24)
    weight = torch.randn(4, 26, 16)

    def mean_gradients(model: ConvEmbed, passes: int) -> tuple[float, float]:
        model.zero_grad()
        for _ in range(passes):
            (model(fbank) * weight).sum().backward()
        first, second = model.conv["0"].weight.grad, model.conv["4"].weight.grad
        return first.norm().item() / passes, second.norm().item() / passes

    expected, got = mean_gradients(plain, 1), mean_gradients(embedding, 60)
    assert got[0] / expected[0] == pytest.approx(0.2, abs=0.04)
    assert got[1] / expected[1] == pytest.approx(1.0, abs=0.2)


def test_positional_encoding_drops_out() -> None:
    seen = []
    stack = SpearEncoder(REGULARIZED).encoder.encoders[0]
    stack.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[1].pos))
    x, frames = torch.randn(1, 60, 16), Frames(torch.zeros(1, 60, dtype=torch.bool))
    stack(x, frames)
    stack.eval()(x, frames)
    dropped, full = (pos[:, -1] for pos in seen)  # the constant column
    assert (full == 1).all()
    assert (dropped == 0).float().mean().item() == pytest.approx(0.15, abs=0.1)
    torch.testing.assert_close(dropped[dropped > 0].unique(), torch.tensor([1 / 0.85]))


def test_a_regularised_student_learns() -> None:
    """Sounds of three pitches are told apart after a few steps."""
    model = SpearEncoder(replace(REGULARIZED, regularize_batch_seconds=0.01))
    head = torch.nn.Linear(16, 3)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = ScaledAdam([p for p in parameters if p.requires_grad], lr=0.03)
    labels = torch.arange(12) % 3
    fbank = torch.randn(12, 30, 128) * 0.5 - 8
    for i, label in enumerate(labels.tolist()):
        fbank[i, :, 40 * label : 40 * label + 40] += 6
    lens, losses = torch.full((12,), 30), []
    for _ in range(50):
        optimizer.zero_grad()
        out = model.encode(fbank, lens).encoder_out.mean(dim=1)
        loss = torch.nn.functional.cross_entropy(head(out), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    model.eval()
    with torch.no_grad():
        out = model.encode(fbank, lens).encoder_out.mean(dim=1)
        assert (head(out).argmax(dim=1) == labels).float().mean() > 0.9


def test_feature_masks() -> None:
    config = replace(REGULARIZED, regularize_start=60000.0)
    uneven = SpearEncoder(replace(config, encoder_unmasked_dim=(8, 16, 4, 8)))
    masks = uneven.encoder._draw_feature_masks(torch.zeros(4000, 2, 16))
    mask, whole, narrow, last = (mask[:, 0] for mask in masks)
    assert (mask[:, :8] == 1).all()
    # All stacks have the same draws, each from its own dimension on.
    assert torch.equal(mask, last) and (whole == 1).all()
    assert torch.equal(narrow[:, 4], mask[:, 8]) and (narrow[:, :4] == 1).all()
    assert torch.equal(narrow[:, 10], mask[:, 12])
    middle, upper = mask[:, 8:12], mask[:, 12:]
    assert torch.equal(middle, middle[:, :1].expand_as(middle))
    assert torch.equal(upper, upper[:, :1].expand_as(upper))
    assert ((upper == 1) <= (middle == 1)).all()
    assert 1 - middle.mean().item() == pytest.approx(0.125, abs=0.02)
    assert 1 - upper.mean().item() == pytest.approx(1 - 0.875**2, abs=0.02)

    model = SpearEncoder(replace(config, encoder_unmasked_dim=(8,) * 4))
    out = model.encode(torch.randn(40, 25, 128), torch.full((40,), 25))
    zero = (out.encoder_out == 0).all(dim=1)
    assert zero[:, 12:].any() and not zero[:, :8].any()
    # Hidden states are taken before the mask (but 5 % of layers are skipped).
    hidden_zero = (out.hidden_states[-1] == 0).all(dim=1)
    assert hidden_zero[zero].float().mean() < 0.5
    assert model.eval().encoder._draw_feature_masks(torch.zeros(2, 2, 16)) == []


def test_large_scores_are_penalised_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = BatchCount(start=60000.0)
    weights = AttentionWeights(16, 2, 8, 4, 48, count)
    with torch.no_grad():
        weights.in_proj.weight.mul_(30)
    x, frames = torch.randn(2, 6, 16), make_frames(2, 6)

    def penalised() -> bool:
        weights.zero_grad()
        # A loss without gradient: what arrives is the penalty's.
        (weights(x, frames).weights * 0.0).sum().backward()
        return bool(weights.in_proj.weight.grad.abs().sum() > 0)

    assert 12 < sum(penalised() for _ in range(300)) < 55  # 10 %
    monkeypatch.setattr(attention, "SCORE_PROB", 1.0)
    assert penalised()
    once = weights.in_proj.weight.grad.clone()
    count.loss_scale = 65536.0  # of float16 training: divided out after the pass
    assert penalised()
    torch.testing.assert_close(weights.in_proj.weight.grad / 65536.0, once)
    weights.eval()
    assert not any(penalised() for _ in range(60))


def test_positions_are_skipped_early_on() -> None:
    count = BatchCount()
    weights = AttentionWeights(16, 2, 8, 4, 48, count)
    with torch.no_grad():
        weights.linear_pos.weight.mul_(100)
    x, frames = torch.randn(1, 6, 16), make_frames(1, 6)

    def without() -> float:
        with torch.no_grad():
            full = weights.eval()(x, frames).weights
            weights.train()
            return sum(
                not torch.allclose(weights(x, frames).weights, full) for _ in range(200)
            ) / (200)

    assert 0.4 < without() < 0.6
    count.value = 4000
    assert without() == 0


def test_absent_at_inference_and_when_switched_off() -> None:
    plain = SpearEncoder(NARROW)
    regularized = SpearEncoder(REGULARIZED)
    assert plain.state_dict().keys() == regularized.state_dict().keys()
    regularized.load_state_dict(plain.state_dict())
    batch = torch.randn(3, 8000), torch.tensor([8000, 6000, 5000])
    with torch.no_grad():
        trained = plain.train()(*batch).encoder_out
        expected = plain.eval()(*batch).encoder_out
        got = regularized.eval()(*batch).encoder_out
        noisy = regularized.train()(*batch).encoder_out
    assert torch.equal(trained, expected) and torch.equal(got, expected)
    assert not torch.allclose(noisy, expected)
    assert regularized.encoder.count.value == 0  # no gradient, no training


def test_regularised_gradients_are_finite_and_reach_everything() -> None:
    config = replace(REGULARIZED, causal=True, padding="exact")
    model = SpearEncoder(config)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    for step in range(6):
        model.encoder.count.value = step * 10000.0
        model.zero_grad()
        out = model(torch.randn(4, 8000), torch.tensor([8000, 6000, 7000, 4000]))
        out.encoder_out.square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert all(torch.isfinite(g).all() for g in grads.values())
        # Skipped parts, too: DDP waits for every gradient.
        assert grads.keys() == trainable - {"mask_emb"}


def test_batches_are_counted_by_their_audio() -> None:
    model = SpearEncoder(replace(REGULARIZED, regularize_batch_seconds=2.0))
    fbank, lens = torch.randn(3, 107, 128), torch.tensor([107, 107, 90])
    for _ in range(2):
        model.encode(fbank, lens)
    assert model.encoder.count.value == pytest.approx(2 * 3 * 1.0 / 2.0)
    model.eval().encode(fbank, lens)
    assert model.encoder.count.value == pytest.approx(3.0)
    started = SpearEncoder(replace(REGULARIZED, regularize_start=1e5))
    assert started.encoder.count.value == 1e5


def test_the_count_survives_averaging_and_resuming(tmp_path: Path) -> None:
    def model(batches: float) -> torch.nn.Module:
        holder = torch.nn.Linear(1, 1)
        holder.schedule = BatchCountState(BatchCount(start=batches))
        return holder

    reporter = Reporter()
    for epoch, batches in [(1, 4000.0), (2, 6000.0)]:
        reporter.set_epoch(epoch)
        with reporter.observe("valid") as sub:
            sub.register({"loss": torch.tensor(float(epoch))})
            sub.next()
        torch.save(model(batches).state_dict(), tmp_path / f"{epoch}epoch.pth")
    average_nbest_models(tmp_path, reporter, [("valid", "loss", "min")], 2)
    averaged = torch.load(tmp_path / "valid.loss.ave.pth", weights_only=True)
    resumed = model(0.0)
    resumed.load_state_dict(averaged)
    assert resumed.schedule.count.value == 5000.0
    # A checkpoint from before there was a count loads strictly, too.
    del averaged["schedule.batches"]
    fresh = model(7.0)
    fresh.load_state_dict(averaged)
    assert fresh.schedule.count.value == 7.0


def test_defaults_of_the_named_sizes() -> None:
    on = {n for n in ("base", "large", "xlarge", "mini", "tiny")}
    on = {n for n in on if ZipformerConfig.from_name(n).regularize}
    assert on == {"base", "large", "xlarge"}
    assert not ZipformerConfig.from_dict({}).regularize  # released config.json
    off = ZipformerConfig.from_dict({"name": "base", "regularize": False})
    assert off.architecture() == ZipformerConfig.from_name("base").architecture()
    assert not SpearEncoder(NARROW).batch_count_state().state_dict()


def test_no_schedule_changes_after_the_stated_end() -> None:
    model = SpearEncoder(REGULARIZED)
    scheduled = [layer.ATTENTION_SKIP, layer.CONVOLUTION_SKIP, layer.FEED_FORWARD_SKIP]
    scheduled += [attention.POS_SKIP, conv_embed.CONVNEXT_SKIP, scaling.BYPASS_MIN]
    scheduled += [regularizers.BALANCER_PROB, regularizers.DROPOUT]
    for module in model.modules():
        if isinstance(module, Balancer):
            scheduled += [*module.positive, *module.abs, module.prob]
        elif isinstance(module, Whiten):
            scheduled.append(module.limit)
        elif isinstance(module, Bypass):
            scheduled.append(module.skip)
    last = [s[-1][0] for s in scheduled if isinstance(s, tuple)]
    assert len(last) > 50 and max(last) == SCHEDULES_END

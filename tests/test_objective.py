"""The pre-training loss of a batch: against loops, and what trainers rely on."""

from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F

from espnet2_spear.codes.targets import TeacherCodes, match_frame_rate
from espnet2_spear.spear import objective as codebook_loss
from espnet2_spear.spear.masking import SpanMasker, pool_time_mask
from espnet2_spear.spear.model import SpearPretrainModel
from espnet2_spear.spear.objective import COUNT, resolve_loss_weights
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import ZipformerConfig

DOMAINS = ["speech", "audio"]
TEACHERS = {"speech": TeacherCodes(4, 8, 50.0), "audio": TeacherCodes(2, 8, 25.0)}
SAMPLES = [16000, 13000, 15000, 9000]


def build(teachers=TEACHERS, factor=1, **options) -> SpearPretrainModel:
    torch.manual_seed(0)
    conf = {"name": "tiny", "output_downsampling_factor": factor}
    student = SpearEncoder(ZipformerConfig.from_dict(conf))
    options = {"loss_weights": "asymmetric", "masker": SpanMasker()} | options
    return SpearPretrainModel(student, teachers, DOMAINS, **options)


def batch(samples=SAMPLES, domains=(0, 1, 1, 0)) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    data = {
        "speech": torch.zeros(len(samples), max(samples)),
        "speech_lengths": torch.tensor(samples),
        "domain": torch.tensor(domains)[:, None],
    }
    for name, teacher in TEACHERS.items():
        frames = [int(n * teacher.frame_rate / 16000) for n in samples]
        shape = (len(samples), max(frames), teacher.num_codebooks)
        data[f"codes_{name}"] = torch.full(shape, -1)
        for i, (n, count) in enumerate(zip(samples, frames, strict=True)):
            data["speech"][i, :n] = 0.1 * torch.randn(n)
            if name == "speech" or domains[i] == 1:  # others have no such codes
                codes = torch.randint(8, (count, teacher.num_codebooks))
                data[f"codes_{name}"][i, :count] = codes
    return data


def by_loops(model: SpearPretrainModel, data: dict[str, torch.Tensor]):
    """Loss and statistics, a frame at a time, by PyTorch's own cross-entropy."""
    fbank, lens = model.student.fbank(data["speech"], data["speech_lengths"])
    generator = torch.Generator().manual_seed(0)
    fbank, mask = model.masker(fbank, lens, model.student.mask_emb, generator)
    out = model.student.encode(fbank, lens)
    rate = model.student.config.frame_rate
    loss, sums = 0.0, defaultdict(lambda: [0.0, 0.0])
    for name, teacher in model.teachers.items():
        hidden, hidden_rate, lengths = out.encoder_out, rate, out.encoder_out_lens
        if teacher.layer is not None:
            hidden, hidden_rate = out.hidden_states[teacher.layer - 1], 50.0
            lengths = out.hidden_states_lens
        frames = hidden.size(1)
        masked = pool_time_mask(mask, round(100 / hidden_rate), frames)
        delay = model.distillation_delta * round(hidden_rate / rate)
        masked = F.pad(masked, (delay, 0))[:, :frames]
        targets = match_frame_rate(
            data[f"codes_{name}"], teacher.frame_rate, hidden_rate, frames - delay
        )
        targets = F.pad(targets, (0, 0, delay, 0), value=-1)
        logits = model.heads[name].logits(hidden)
        for i, domain in enumerate(data["domain"].flatten().tolist()):
            weight = model.loss_weights[domain, list(model.teachers).index(name)].item()
            if weight == 0:
                continue
            for t in range(int(lengths[i])):
                kind = model.masked_weight if masked[i, t] else model.unmasked_weight
                n = targets.size(2)
                prefix = f"{DOMAINS[domain]}_{name}"
                for c, target in enumerate(targets[i, t].tolist()):
                    if target < 0:
                        continue
                    entropy = F.cross_entropy(logits[i, t, c], torch.tensor(target))
                    loss = loss + weight * kind * rate / hidden_rate * entropy / n
                    hit = float(logits[i, t, c].argmax() == target)
                    group = next(
                        g
                        for g, part in enumerate(torch.arange(n).tensor_split(4))
                        if c in part
                    )
                    which = "masked" if masked[i, t] else "unmasked"
                    figures = {"loss": entropy.item(), f"acc_{which}": hit}
                    for key, value in (figures | {f"acc_group{group}": hit}).items():
                        sums[f"{prefix}_{key}"][0] += value
                        sums[f"{prefix}_{key}"][1] += 1
    return loss, {k: a / b for k, (a, b) in sums.items()}


INNER = {
    "speech": TeacherCodes(4, 8, 50.0),
    "audio": TeacherCodes(2, 8, 25.0, layer=3),
}


@pytest.mark.parametrize(
    "teachers, factor, options",
    [
        (TEACHERS, 1, {}),
        (TEACHERS, 2, {"masked_weight": 0.7, "unmasked_weight": 0.2}),
        (INNER, 1, {}),
        (INNER, 2, {"loss_weights": "joint"}),
        (INNER, 2, {"distillation_delta": 3, "masked_weight": 0.5}),
    ],
    ids=["50 Hz", "25 Hz", "inner", "inner at twice the rate", "delayed"],
)
def test_equals_loops(teachers, factor, options, monkeypatch) -> None:
    model = build(teachers, factor, **options).eval()
    data = batch()
    loss, stats, weight = model(**data)
    expected, figures = by_loops(model, data)
    frames = int(model.student.output_lengths(data["speech_lengths"]).sum())
    assert weight == frames
    expected = expected / frames
    torch.testing.assert_close(loss, expected)
    assert set(figures) <= set(stats)
    for key, value in stats.items():
        if key in figures:
            assert value.item() == pytest.approx(figures[key], rel=1e-4), key
        else:
            known = key in ("loss", "mask_ratio") or key.endswith(COUNT)
            assert known or value.isnan(), key
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    params = list(names.values())
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    wanted = torch.autograd.grad(expected, params, allow_unused=True)
    for name, a, b in zip(names, grads, wanted, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
    # As on a device where the host must not look at values.
    monkeypatch.setattr(codebook_loss, "HOST", ())
    torch.testing.assert_close(model(**data)[0], loss)


def test_codes_of_two_bytes() -> None:
    """One codebook of 2000 classes, as k-means has it."""
    teachers = {"speech": TeacherCodes(1, 2000, 50.0)}
    model = build(teachers, loss_weights="joint").eval()
    data = batch()
    frames = data["codes_speech"].size(1)
    data["codes_speech"] = torch.randint(2000, (4, frames, 1), dtype=torch.int16)
    data["codes_speech"][0, 5] = 1999
    loss, stats, _ = model(**data)
    expected, figures = by_loops(model, data)
    torch.testing.assert_close(loss, expected / int(model(**data)[2]))
    assert model.heads["speech"].weight.size(0) == 2000
    assert stats["speech_speech_loss"].item() == pytest.approx(
        figures["speech_speech_loss"], rel=1e-4
    )


def test_heads_without_targets_get_zero_gradients() -> None:
    model = build().train()
    data = batch(SAMPLES[:2], (0, 0))  # speech only
    loss, stats, _ = model(**data)
    loss.backward()
    for p in model.heads["audio"].parameters():
        assert p.grad is not None and (p.grad == 0).all()
    assert all(p.grad is not None for p in model.heads["speech"].parameters())
    assert stats["audio_audio_loss"].isnan() and stats["speech_speech_loss"] > 0
    assert set(stats) == set(model(**batch())[1])  # the same keys on every rank


def test_weight_gives_the_exact_mean_over_parts_of_a_batch() -> None:
    """What ESPnet does with ranks, and the trainer with accumulation."""
    data = batch([16000, 16000, 16000], (0, 1, 0))
    data["codes_speech"][0, 3:20] = -1
    parts = [{k: v[i] for k, v in data.items()} for i in (slice(1), slice(1, 3))]
    model = build(masker=SpanMasker(time_prob=0.0, channel_prob=0.0))
    losses, _, weights = zip(*(model(**x) for x in (data, *parts)), strict=True)
    mean = (losses[1] * weights[1] + losses[2] * weights[2]) / sum(weights[1:])
    torch.testing.assert_close(losses[0][None], mean)
    assert weights[0] == sum(weights[1:])
    model.normalize = "sum"
    losses, _, weights = zip(*(model(**x) for x in (data, *parts)), strict=True)
    torch.testing.assert_close(losses[0], losses[1] + losses[2])
    assert weights == (1, 1, 1)
    # In validation it must not depend on the size of batches.
    loss, _, weight = model.eval()(**data)
    torch.testing.assert_close(loss[None] * weight, losses[0][None])


INNER_ONLY = {"speech": TeacherCodes(2, 8, 25.0, layer=3)}


@pytest.mark.parametrize(
    "teachers, options, message",
    [
        (
            {**TEACHERS, "audio": TeacherCodes(2, 8, 25.0, layer=9)},
            {},
            r"teachers.audio.layer 9: .* 1 to 3",
        ),
        (INNER_ONLY, {"loss_weights": "joint"}, "every teacher has a layer"),
        (TEACHERS, {"masked_weight": -1.0}, "masked_weight -1.0: expected a number"),
        (TEACHERS, {"unmasked_weight": "1"}, "unmasked_weight '1': expected a number"),
        (TEACHERS, {"masked_weight": float("nan")}, "masked_weight nan: expected"),
        (TEACHERS, {"masked_weight": 0, "unmasked_weight": 0.0}, "nothing is learned"),
        (TEACHERS, {"distillation_delta": -1}, "distillation_delta -1: expected"),
        (TEACHERS, {"distillation_delta": 0.5}, "distillation_delta 0.5: expected"),
        (TEACHERS, {"normalize": "mean"}, "'frames' or 'sum'"),
    ],
)
def test_bad_options_are_refused(teachers, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        build(teachers, **options)


THREE = ["speech", "audio", "music"]
BOTH = {"speech": 1.0, "audio": 0.1}


@pytest.mark.parametrize(
    "option, domains, teachers, table",
    [
        ("asymmetric", DOMAINS, DOMAINS, {"speech": {"speech": 1.0}, "audio": BOTH}),
        (
            "disjoint",
            DOMAINS,
            DOMAINS,
            {"speech": {"speech": 1.0}, "audio": {"audio": 0.1}},
        ),
        ("joint", DOMAINS, DOMAINS, {"speech": BOTH, "audio": BOTH}),
        (
            {"preset": "asymmetric", "main": "audio", "weights": {"music": 0.5}},
            THREE,
            THREE,
            {
                "speech": {"speech": 0.1, "audio": 1.0},
                "audio": {"audio": 1.0},
                "music": {"audio": 1.0, "music": 0.5},
            },
        ),
        (
            "asymmetric",
            ["speech", "noise"],
            ["wavlm"],
            {"speech": {"wavlm": 1.0}, "noise": {"wavlm": 1.0}},
        ),
        # A table is taken as it is, even of a domain called preset.
        ({"preset": {"t": 2}}, ["preset"], ["t"], {"preset": {"t": 2.0}}),
    ],
)
def test_tables(option, domains, teachers, table) -> None:
    assert resolve_loss_weights(option, domains, teachers) == table


@pytest.mark.parametrize(
    "option, message",
    [
        ("symmetric", "one of joint, disjoint, asymmetric"),
        ({"preset": "joint", "main": "x"}, "unknown teacher 'x'"),
        ({"preset": "joint", "weights": {"x": 1}}, "unknown teacher 'x'"),
        ({"preset": "joint", "weight": {}}, "loss_weights: .*weight"),
        ({"speech": {"speech": 1.0}}, "no domain uses the teacher 'audio'"),
        ({"music": {"speech": 1.0}}, "unknown domain 'music'"),
        ({"speech": {"x": 1.0}}, "unknown teacher 'x'"),
        ({"speech": {"speech": -1.0}}, "speech.speech -1.0: expected a number"),
        ({"speech": {"speech": float("nan")}}, "speech.speech nan: expected a number"),
        ({"speech": {"speech": "one"}}, "speech.speech 'one': expected a number"),
        ({"speech": 1.0}, "speech 1.0: expected teacher -> weight"),
        (["joint"], "expected domain -> teacher -> weight, or one of joint"),
        ({"preset": "joint", "weights": {"audio": -1}}, "weights.audio -1"),
        ({"preset": "joint", "speech": {}}, "'speech'. beside preset"),
    ],
)
def test_bad_tables_are_refused(option, message) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_loss_weights(option, DOMAINS, list(TEACHERS))


@pytest.mark.parametrize(
    "preset, teachers, message",
    [
        ("disjoint", ["speech", "dasheng"], "'dasheng' needs a domain of its name"),
        ("asymmetric", ["speech", "dasheng"], "'dasheng' needs a domain of its name"),
        ("disjoint", ["speech"], "no teacher for domain 'audio'"),
    ],
)
def test_presets_that_need_domains_and_teachers(preset, teachers, message) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_loss_weights(preset, DOMAINS, teachers)

"""Mixing of batches: against loops, and in distribution."""

import math

import numpy as np
import pytest
import torch
from test_objective import build
from torch.utils._python_dispatch import TorchDispatchMode

from espnet2_spear.codes.targets import TeacherCodes
from espnet2_spear.spear.masking import SpanMasker
from espnet2_spear.spear.mixing import PRESETS, Mixer, MixerConfig, MixingRule, Mixture

RATE = 16000
DOMAINS = ["speech", "audio"]
TEACHERS = {"speech": TeacherCodes(5, 64, 50.0), "audio": TeacherCodes(3, 64, 25.0)}
SAMPLES = [16000, 12345, 9001, 15999, 4800]


def mixer(conf: dict | None = None, **rule) -> Mixer:
    """A mixer of a preset, or of one rule for speech."""
    if conf is None:
        base = {"prob": 1.0, "noise_prob": 0.0, "mix_targets": True}
        conf = {"rules": {"speech": base | rule}}
        if conf["rules"]["speech"]["mix_targets"]:
            conf["mixed_teachers"] = list(TEACHERS)
    return Mixer(
        MixerConfig.from_dict(conf, DOMAINS, list(TEACHERS)), DOMAINS, TEACHERS
    )


def batch(samples=SAMPLES, domain=None, clips=2) -> dict:
    torch.manual_seed(1)
    speech = torch.zeros(len(samples), max(samples))
    for row, n in zip(speech, samples, strict=True):
        row[:n] = 0.3 * torch.rand(()) * torch.randn(n)
    codes = {}
    for name, t in TEACHERS.items():
        # Codes fall a little short of their audio, as those of a teacher do.
        frames = [max(1, int(n * t.frame_rate / RATE) - 1) for n in samples]
        codes[name] = torch.full((len(samples), max(frames), t.num_codebooks), -1)
        for row, n in zip(codes[name], frames, strict=True):
            row[:n] = torch.randint(t.codebook_size, (n, t.num_codebooks))
    lengths = torch.tensor([7000, 30000][:clips])
    noise = torch.zeros(clips, 30000)
    for row, n in zip(noise, lengths.tolist(), strict=True):
        row[:n] = 0.2 * torch.randn(n)
    return {
        "speech": speech,
        "lengths": torch.tensor(samples),
        "domain": torch.tensor(domain or [0] * len(samples)),
        "codes": codes,
        "noise": noise,
        "noise_lengths": lengths,
    }


def slow(data: dict, got: Mixture, uniform: dict[str, torch.Tensor]):
    """Waveforms, lengths and codes of a plan, a sample and an entry at a time."""
    plan, size = got.plan, len(data["lengths"])
    clips, noise = (
        [x[:n].numpy() for x, n in zip(data[k], data[m].tolist(), strict=True)]
        for k, m in (("speech", "lengths"), ("noise", "noise_lengths"))
    )
    sources = clips + noise
    speech, lengths = np.zeros(got.speech.shape), []
    codes = {k: np.full(v.shape, -1) for k, v in got.codes.items()}
    for i in range(size):
        a = clips[i].astype(np.float64)
        speech[i, : len(a)] = a
        for name, wanted in codes.items():
            old = data["codes"][name][i].numpy()
            wanted[i, : len(old)] = old
        lengths.append(len(a))
        if not plan.mixed[i]:
            continue
        b = sources[int(plan.row[i])].astype(np.float64)
        snr, begin = float(plan.snr[i]), int(plan.begin[i])
        start, length = int(plan.source_begin[i]), int(plan.length[i])
        gain = math.sqrt(np.mean(a**2) * 10 ** (-snr / 10) / np.mean(b**2))
        for k in range(length):
            speech[i, begin + k] += gain * b[(start + k) % len(b)]
        lengths[i] = max(len(a), begin + length)
        if plan.is_noise[i]:
            continue
        power_b = gain**2 * np.mean(b**2)
        p = power_b / (np.mean(a**2) + power_b + 1e-8)
        for name, wanted in codes.items():
            hop = int(RATE / TEACHERS[name].frame_rate)
            assert begin % hop == start % hop == 0
            other = data["codes"][name][int(plan.row[i])].numpy()
            for t in range(wanted.shape[1]):
                u = t - begin // hop + start // hop
                if not begin <= t * hop < begin + length or u >= len(other):
                    continue
                for c in range(wanted.shape[2]):
                    # The last frame of A is the last that is A's as a whole.
                    tail = (t + 1) * hop > len(a)
                    if other[u, c] >= 0 and (tail or uniform[name][i, t, c] < p):
                        wanted[i, t, c] = other[u, c]
    return speech, lengths, codes


CASES = {
    "token mixing": {},
    "at equal power": {"utterance_snr": [0, 0]},
    "pieces": {"utterance_share": [0.2, 0.5]},
    "with noise": {"noise_prob": 0.5, "noise_share": [0.2, 0.8]},
    "with noise all over": {"noise_prob": 0.5},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_loops(case: str) -> None:
    mix, data = mixer(**CASES[case]), batch()
    for seed in range(6):
        torch.manual_seed(seed)
        got = mix(**data)
        torch.manual_seed(seed)
        torch.rand(len(SAMPLES), 7 + len(SAMPLES))  # of the plan
        uniform = {k: torch.rand(v.shape) for k, v in got.codes.items()}
        speech, lengths, codes = slow(data, got, uniform)
        np.testing.assert_allclose(got.speech, speech, atol=2e-6)
        assert got.lengths.tolist() == lengths
        for name, wanted in codes.items():
            np.testing.assert_array_equal(got.codes[name], wanted)
        assert got.plan.mixed.all()
        if case == "token mixing":
            assert max(lengths) > max(SAMPLES)


class LargestTensor(TorchDispatchMode):
    """Notes how many bytes the largest result of an operation has."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            size = result.untyped_storage().nbytes()
            self.bytes = max(self.bytes, size)
        return result


def test_memory_is_that_of_the_batch() -> None:
    """Noise that is far longer than the utterances is not taken whole for each."""
    mix, data = mixer({"preset": "token_mixing"}), batch([4000] * 100)
    data["noise"] = 0.1 * torch.randn(8, 200_000)
    data["noise_lengths"] = torch.tensor([200_000] * 8)
    noise = data["noise"].numel()
    with LargestTensor() as largest:
        got = mix(**data)
    assert got.plan.is_noise.any()
    # The mixture, by an index of eight bytes a sample; or all samples as they came.
    allowed = max(8 * got.speech.numel(), 4 * (data["speech"].numel() + noise))
    assert 4 * got.speech.numel() < largest.bytes <= allowed


@pytest.mark.parametrize("snr, share", [(0, 0.5), (5, 0.240), (-5, 0.760)])
def test_entries_are_replaced_one_by_one(snr: int, share: float) -> None:
    n = 20
    data = batch([32000] * n)
    # Codes tell whose they are.
    for i in range(n):
        data["codes"]["speech"][i] = i
    mix = mixer(utterance_snr=[snr, snr])
    torch.manual_seed(0)
    replaced = []
    for _ in range(10):
        got = mix(**data)
        for i in range(n):
            first = int(got.plan.begin[i]) // 320
            row = got.codes["speech"][i]
            assert (row[:first] == i).all()
            # All codes end a frame early.
            overlap, tail = row[first:99], row[100 : first + 99]
            assert (tail == got.plan.row[i]).all()
            assert ((overlap == i) | (overlap == got.plan.row[i])).all()
            replaced.append((overlap != i).float())
    replaced = torch.cat(replaced)
    assert replaced.mean().item() == pytest.approx(share, abs=0.01)
    # Codebooks of a frame are replaced independently of each other, frames too.
    assert replaced.T.corrcoef().fill_diagonal_(0.0).abs().max() < 0.05
    series = torch.stack([replaced[:-1, 0], replaced[1:, 0]])
    assert abs(series.corrcoef()[0, 1]) < 0.05


def test_what_is_mixed_how_often() -> None:
    """The published values: 40 % noise, 10 % another utterance [5.8]."""
    mix = mixer({"preset": "token_mixing"})
    data = batch([4000, 34000] * 20)
    torch.manual_seed(0)
    plans = [mix(**data).plan for _ in range(100)]

    def all_of(name: str) -> torch.Tensor:
        return torch.stack([getattr(plan, name) for plan in plans]).float()

    mixed, noise = all_of("mixed") > 0, all_of("is_noise") > 0
    other = mixed & ~noise
    assert noise.float().mean().item() == pytest.approx(0.4, abs=0.02)
    assert other.float().mean().item() == pytest.approx(0.1, abs=0.015)
    snr = all_of("snr")
    for chosen, low, high in ((noise, 10, 20), (other, -5, 5)):
        values = snr[chosen]
        assert low <= values.min() < low + 0.5 and high - 0.5 < values.max() <= high
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.5)
        assert values.std().item() == pytest.approx(10 / 12**0.5, abs=0.3)
    begin = all_of("begin")
    for part, longest in ((slice(0, None, 2), 4000), (slice(1, None, 2), 32000)):
        offsets = begin[:, part][other[:, part]]
        assert offsets.max() < longest and (offsets % 320 == 0).all()
        # Rounded down to whole frames of 320 samples.
        mean = longest / 2 - 160
        assert offsets.mean().item() == pytest.approx(mean, rel=0.15)
    # Every clip and every partner gets its turn, nobody becomes its own.
    rows = all_of("row").long()
    own = torch.arange(40).expand_as(rows)
    assert set(rows[noise].tolist()) == {40, 41}
    assert set(rows[other].tolist()) == set(range(40)) and (rows != own)[mixed].all()


def test_pieces_lie_within_the_utterance() -> None:
    mix, data = mixer({"preset": "batch_mixing"}), batch()
    torch.manual_seed(0)
    kinds = set()
    for _ in range(200):
        got = mix(**data)
        assert got.speech.shape == data["speech"].shape and not got.codes
        assert (got.lengths == data["lengths"]).all()
        plan = got.plan
        for i in plan.mixed.nonzero().flatten().tolist():
            noise, n = bool(plan.is_noise[i]), SAMPLES[i]
            kinds.add(noise)
            low, high = (0.2, 0.8) if noise else (0.2, 0.5)
            length = int(plan.length[i])
            source = (SAMPLES + data["noise_lengths"].tolist())[plan.row[i]]
            shorter = not noise and length == source
            assert shorter or low * n - 1 <= length <= high * n
            assert int(plan.begin[i]) + length <= n
            assert noise or int(plan.source_begin[i]) + length <= source
    assert kinds == {True, False}


def test_only_utterances_of_the_same_domain_are_mixed() -> None:
    data = batch([8000] * 6, domain=[0, 1, 0, 1, 1, 0])
    mix = mixer()
    for _ in range(50):
        plan = mix(**data).plan
        assert plan.mixed.tolist() == [True, False, True, False, False, True]
        assert (data["domain"][plan.row] == data["domain"]).all()
    alone = mix(**batch([8000, 9000], domain=[0, 1]))
    assert not alone.plan.mixed.any()


def test_rules_are_those_of_the_domain() -> None:
    mix, data = mixer({"preset": "task_aware"}), batch([8000] * 20, [0, 1] * 10)
    torch.manual_seed(0)
    plans = [mix(**data).plan for _ in range(200)]
    noise = torch.stack([p.is_noise for p in plans]).float().mean(dim=0).view(-1, 2)
    mixed = torch.stack([p.mixed for p in plans]).float().mean(dim=0).view(-1, 2)
    assert mixed.mean(dim=0).tolist() == pytest.approx([0.3, 0.5], abs=0.03)
    assert noise.mean(dim=0).tolist() == pytest.approx([0.15, 0.5], abs=0.03)


def test_same_seed_same_mixture() -> None:
    mix, data = mixer({"preset": "token_mixing"}), batch(SAMPLES * 4)

    def run(seed: int) -> Mixture:
        torch.manual_seed(seed)
        return mix(**data)

    first, second, other = run(3), run(3), run(4)
    assert torch.equal(first.speech, second.speech)
    assert torch.equal(first.codes["speech"], second.codes["speech"])
    shape = first.speech.shape == other.speech.shape
    assert not (shape and torch.equal(first.speech, other.speech))


def test_silence_is_left_alone() -> None:
    data = batch([8000] * 4)
    data["speech"][1] = 0.0
    data["noise"][:] = 0.0
    for noise_prob in (0.0, 1.0):
        got = mixer(noise_prob=noise_prob)(**data)
        assert got.speech.isfinite().all() and got.plan.gain.isfinite().all()
        assert not got.plan.mixed[1]
        assert not got.plan.mixed[got.plan.row == 1].any()
        assert noise_prob == 0.0 or not got.plan.mixed.any()


def test_utterances_without_codes() -> None:
    """A source without codes replaces nothing, one without own codes gets some."""
    data = batch([8000] * 2)
    data["codes"]["speech"][1] = -1
    got = mixer(utterance_snr=[-90, -90])(**data)  # everything would be replaced
    codes, old = got.codes["speech"], data["codes"]["speech"]
    assert (codes[0, : old.size(1)] == old[0]).all()
    assert (codes[0, old.size(1) :] == -1).all()
    first = int(got.plan.begin[1]) // 320
    count = min(old.size(1), codes.size(1) - first)
    assert (codes[1, first : first + count] == old[0, :count]).all()
    assert (codes[1, :first] == -1).all()


def test_training_mixes_and_validation_does_not() -> None:
    torch.manual_seed(0)
    mix = mixer(None)
    teachers = {"speech": TeacherCodes(5, 64, 50.0), "audio": TeacherCodes(3, 64, 25.0)}
    model = build(teachers, mixer=mix, masker=SpanMasker(), loss_weights="joint")
    data = batch()
    inputs = {
        "speech": data["speech"],
        "speech_lengths": data["lengths"],
        "domain": data["domain"][:, None],
        "noise": data["noise"],
        "noise_lengths": data["noise_lengths"],
        **{f"codes_{k}": v for k, v in data["codes"].items()},
    }
    loss, stats, frames = model.train()(**inputs)
    loss.backward()
    assert stats["mixed_utterance"] == 1.0 and stats["mixed_noise"] == 0.0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    _, stats, plain_frames = model.eval()(**inputs)
    assert "mixed_noise" not in stats and frames > plain_frames
    wanted = model.student.output_lengths(data["lengths"]).sum()
    assert plain_frames == wanted


# --- Options --------------------------------------------------------------------------


def test_presets_and_overrides() -> None:
    assert MixerConfig.from_dict({}, DOMAINS, ["speech"]) is None
    conf = MixerConfig.from_dict({"preset": "token_mixing"}, DOMAINS, ["speech"])
    rule = conf.rules["speech"]
    assert (rule.prob, rule.noise_prob) == (0.5, 0.8)
    assert rule.utterance_snr == (-5, 5) and rule.max_offset == 2.0
    assert conf.mixed_teachers == ("speech",) and set(conf.rules) == {"speech"}
    assert conf.needs_noise and conf.max_extension == 2.0
    quiet = {"preset": "token_mixing", "rules": {"speech": {"noise_prob": 0}}}
    conf = MixerConfig.from_dict(quiet, DOMAINS, ["speech"])
    assert not conf.needs_noise and conf.rules["speech"].mix_targets
    for name, noise in PRESETS.items():
        conf = MixerConfig.from_dict({"preset": name}, DOMAINS, ["speech", "audio"])
        assert dict(conf.rules) == dict(noise) and conf.needs_noise
        assert (conf.max_extension > 0) == (name == "token_mixing")
    conf = MixerConfig.from_dict({"preset": "noise"}, ["audio"], ["audio"])
    assert set(conf.rules) == {"audio"} and conf.rules["audio"].noise_snr == (10, 20)


@pytest.mark.parametrize(
    "conf, message",
    [
        ({"presets": "noise"}, r"unknown \['presets'\]"),
        ({"preset": "nois"}, "'nois': one of"),
        ({"rules": {"music": {}}}, "unknown domain 'music'"),
        ({"rules": {"speech": {"prob": 0.5}}}, "rules.speech: .*noise_prob"),
        ({"rules": {"speech": {"prob": 1.5, "noise_prob": 0}}}, "prob 1.5"),
        ({"preset": "noise", "rules": {"audio": {"noise_snr": 5}}}, "noise_snr 5"),
        ({"preset": "noise", "rules": {"audio": {"noise_snr": [9, 5]}}}, "noise_snr"),
        ({"preset": "noise", "rules": {"audio": {"noise_share": [0, 1]}}}, "share"),
        ({"preset": "token_mixing", "mixed_teachers": ["x"]}, "mixed_teachers"),
        ({"rules": {"speech": {"prob": 0, "noise_prob": 0}}}, "no domain"),
        ({"rules": {"speech": 0.5}}, "rules.speech 0.5: expected fields"),
        ({"preset": "noise", "mixed_teachers": ["speech"]}, "has no effect"),
        (
            {"preset": "batch_mixing", "rules": {"speech": {"max_offset": 1.0}}},
            "effect",
        ),
    ],
)
def test_bad_options_are_refused(conf: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixerConfig.from_dict(conf, DOMAINS, ["speech", "audio"])


def test_what_cannot_be_mixed_is_refused() -> None:
    with pytest.raises(ValueError, match="no domain"):
        MixerConfig.from_dict({"preset": "token_mixing"}, ["audio"], ["audio"])
    data = batch(clips=0) | {"noise": None, "noise_lengths": None}
    with pytest.raises(ValueError, match="--noise_scp"):
        mixer(noise_prob=0.1)(**data)
    odd = {"speech": TeacherCodes(1, 4, 75.0)}
    conf = MixerConfig({"speech": MixingRule(1.0, 0.0)}, ("speech",))
    with pytest.raises(ValueError, match="whole frames"):
        Mixer(conf, ["speech"], odd)

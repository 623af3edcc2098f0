"""Steps of utterances: by weight, in bounds, the same for any number of GPUs."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from espnet2.train.distributed_utils import DistributedOption
from tiny_training import options, write_data

from espnet2_spear.data.iter_factory import StepBatches
from espnet2_spear.data.manifest import Lists, Manifest, open_manifest
from espnet2_spear.data.permutation import hash64, permuted
from espnet2_spear.data.sampler import SamplerConfig, StepSampler, validation_batches
from espnet2_spear.fileio.tables import DataDirError
from espnet2_spear.tasks.spear import SpearTask

RATE = 16000


def make_manifest(folder: Path, counts: dict[str, int], longest: int = 20) -> Manifest:
    """Utterances of 1 s to ``longest`` s; corpora with "x" in their name are audio."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    ids = sorted(f"{name}-{i:06d}" for name, n in counts.items() for i in range(n))
    lengths = rng.integers(RATE, longest * RATE, len(ids))
    domains = ["audio" if "x" in u.split("-")[0] else "speech" for u in ids]
    tables = {"lengths": lengths, "domain": domains, "wav": ids}
    for name, values in tables.items():
        lines = (f"{u} {v}\n" for u, v in zip(ids, values, strict=True))
        (folder / name).write_text("".join(lines))
    lists = Lists(
        str(folder / "lengths"), str(folder / "domain"), {"speech": str(folder / "wav")}
    )
    return open_manifest(folder / "m", lists, ["speech", "audio"], sorted(counts))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    counts = {"a": 3000, "b": 900, "x": 1200, "tiny": 12}
    return make_manifest(tmp_path_factory.mktemp("manifest"), counts)


def config(**options: object) -> SamplerConfig:
    weights = {"a": 1.0, "b": 2.5, "x": 1.0, "tiny": 1.0}
    return SamplerConfig(**{"corpus_weights": weights, **options})


def take(sampler: StepSampler, count: int, start: int = 0) -> list[np.ndarray]:
    return list(islice(sampler.steps(start), count))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 17, 1000, 4097])
def test_permutations(size: int) -> None:
    index, sizes = np.arange(size), np.full(size, size)
    orders = [permuted(index, sizes, np.tile(hash64(0, k), size)) for k in range(3)]
    for order in orders:
        assert sorted(order) == list(range(size))
    if size > 100:
        assert (orders[0] != orders[1]).mean() > 0.9
        assert abs(np.corrcoef(index, orders[0])[0, 1]) < 0.15
        assert (np.diff(orders[0]) == 1).mean() < 0.05


def test_permutations_of_three_are_equally_frequent() -> None:
    keys = np.repeat(hash64(1, np.arange(6000)), 3)
    index = np.tile(np.arange(3), 6000)
    orders = permuted(index, np.full(18000, 3), keys).reshape(-1, 3)
    counts = Counter(map(tuple, orders.tolist()))
    assert len(counts) == 6
    expected = 1000
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 20.5  # 0.1 %


def test_weights_are_realised(manifest: Manifest) -> None:
    sampler = StepSampler(manifest, config(domain_weights={"audio": 2}), 160 * RATE, 4)
    steps = take(sampler, 3000)
    rows = np.bincount(np.concatenate(steps), minlength=len(manifest))
    weights = {"a": 1.0, "b": 2.5, "x": 2.0, "tiny": 1.0}
    seen = {
        g.corpus: rows[g.first : g.last].sum() / (g.last - g.first)
        for g in manifest.groups
    }
    unit = sum(map(len, steps)) / sum(
        weights[g.corpus] * (g.last - g.first) for g in manifest.groups
    )
    for name, weight in weights.items():
        assert seen[name] == pytest.approx(weight * unit, rel=0.01)
    # No utterance of a corpus is preferred: passes without replacement, not chance,
    # which would spread by the square root of the mean.
    for group in manifest.groups:
        counts = rows[group.first : group.last]
        assert counts.std() < 0.5 * counts.mean() ** 0.5
    assert sampler.steps_per_pass * unit == pytest.approx(3000, rel=0.01)


def test_every_utterance_once_before_any_twice(manifest: Manifest) -> None:
    sampler = StepSampler(manifest, config(num_buckets=1), 100 * RATE, 1)
    count = int(sampler.steps_per_pass / 2.5)  # weight 2.5 is seen once
    rows = np.bincount(np.concatenate(take(sampler, count)), minlength=len(manifest))
    assert rows.max() == 1


@pytest.mark.parametrize("headroom", [0.0, 2.0])
@pytest.mark.parametrize("max_utts", [None, 9])
def test_bounds_and_no_repetition(
    manifest: Manifest, headroom: float, max_utts: int | None
) -> None:
    options = {"mix_headroom_seconds": headroom, "max_utts": max_utts}
    sampler = StepSampler(manifest, config(**options), 100 * RATE, 4)
    lengths = np.asarray(manifest.samples, np.int64)
    filled = padding = 0.0
    for rows in take(sampler, 2500):
        assert len(set(rows.tolist())) == len(rows)
        assert len(rows) % 4 == 0
        # Any number of shards together, because the longest bounds them all.
        padded = len(rows) // 4 * (lengths[rows].max() + headroom * RATE)
        assert padded <= 100 * RATE
        assert len(rows) // 4 <= (max_utts or 1000)
        filled += padded / (100 * RATE) / 2500
        padding += (1 - lengths[rows].mean() / lengths[rows].max()) / 2500
    if max_utts is None:
        assert filled > 0.95
    assert padding < 0.15


def test_steps_do_not_depend_on_the_number_of_gpus(manifest: Manifest) -> None:
    def read(world_size: int, accum_grad: int) -> list[list[int]]:
        """Rows of ten steps, from what the ranks read in two epochs."""
        iters = 5 * accum_grad
        parts = []
        for rank in range(world_size):
            sampler = StepSampler(manifest, config(), 100 * RATE, 8, seed=3)
            batches = StepBatches(sampler, iters, accum_grad, world_size, rank)
            assert len(batches) == iters
            parts.append([r for epoch in (1, 2) for r in batches.rows(epoch)])
        steps = []
        for step in range(10):
            rows = []
            for number in range(step * accum_grad, (step + 1) * accum_grad):
                sizes = {len(part[number]) for part in parts}
                assert len(sizes) == 1  # no rank waits for another
                rows += [row for part in parts for row in part[number].tolist()]
            assert len(set(rows)) == len(rows)  # no rank reads what another does
            steps.append(rows)
        return steps

    reference = read(1, 1)
    for world_size, accum_grad in [(2, 1), (4, 1), (8, 1), (1, 8), (2, 2), (4, 2)]:
        assert read(world_size, accum_grad) == reference
    other = StepSampler(manifest, config(), 100 * RATE, 8, seed=4)
    assert [r.tolist() for r in take(other, 10)] != reference


def test_numbers_that_do_not_divide(manifest: Manifest) -> None:
    sampler = StepSampler(manifest, config(), 100 * RATE, 8)
    with pytest.raises(ValueError, match="step_shards=8 is no multiple of 3 GPUs"):
        StepBatches(sampler, 10, 1, 3, 0)
    with pytest.raises(ValueError, match="end within a step"):
        StepBatches(sampler, 9, 2, 2, 0)


@pytest.mark.parametrize("accum_grad", [1, 2])
def test_any_batch_can_be_the_first(manifest: Manifest, accum_grad: int) -> None:
    def batches(sampler: StepSampler) -> StepBatches:
        return StepBatches(sampler, 400, accum_grad, 2, 1)

    sampler = StepSampler(manifest, config(), 100 * RATE, 4)
    whole = [r.tolist() for e in (1, 2, 3) for r in batches(sampler).rows(e)]
    assert len(whole) == 1200  # over two blocks of steps without accumulation
    for epoch, start in [
        (1, 0),
        (1, 1),
        (2, 333),
        (3, 0),
        (3, 399),
        (1, 200),
        (3, 400),
    ]:
        fresh = StepSampler(manifest, config(), 100 * RATE, 4)
        # Another object that has been elsewhere before, as well as a fresh one.
        for one in (fresh, sampler):
            rows = [r.tolist() for r in batches(one).rows(epoch, start)]
            assert rows == whole[(epoch - 1) * 400 + start : epoch * 400]


def test_weight_zero_leaves_out(manifest: Manifest) -> None:
    sampler = StepSampler(manifest, config(domain_weights={"audio": 0}), 100 * RATE, 1)
    domains = {manifest.group(r).domain for s in take(sampler, 50) for r in s.tolist()}
    assert domains == {"speech"}
    weights = {"speech": 0, "audio": 0}
    with pytest.raises(DataDirError, match="all utterances have weight 0"):
        StepSampler(manifest, config(domain_weights=weights), 100 * RATE, 1)


def test_groups_share_batches(manifest: Manifest) -> None:
    sampler = StepSampler(manifest, config(), 160 * RATE, 1)
    mixed = [len({manifest.group(r).corpus for r in s}) > 1 for s in take(sampler, 200)]
    assert np.mean(mixed) > 0.95


def test_little_data(tmp_path: Path) -> None:
    few = make_manifest(tmp_path / "few", {"a": 5}, longest=4)
    weights = SamplerConfig(corpus_weights={"a": 1.0})
    for rows in take(StepSampler(few, weights, 100 * RATE, 4), 20):
        assert len(set(rows.tolist())) == len(rows) == 4  # less than would fit
    with pytest.raises(DataDirError, match="5 utterances for steps of 8 shards"):
        StepSampler(few, weights, 100 * RATE, 8)
    with pytest.raises(DataDirError, match=r"'a-0.*longer than a shard of 2\.0 s"):
        StepSampler(few, weights, 2 * RATE, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"domain_weights": {"audio": -1}},
        {"corpus_weights": {"a": "often"}},
        {"num_buckets": 0},
        {"max_utts": 1.5},
        {"mix_headroom_seconds": -1},
    ],
)
def test_bad_options(options: dict) -> None:
    with pytest.raises(ValueError, match=f"sampler_conf.{next(iter(options))}"):
        SamplerConfig(**options)


@pytest.mark.parametrize(
    "headroom, mixing, warns",
    [
        (None, "token_mixing", False),  # what the mixer adds: 2 s
        (None, "noise", False),  # nothing
        (2.5, "token_mixing", False),
        (0.5, "token_mixing", True),
    ],
)
def test_headroom_is_what_the_mixer_adds(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    headroom: float | None,
    mixing: str,
    warns: bool,
) -> None:
    data = write_data(tmp_path / "data", 40)
    (tmp_path / "noise.scp").write_text(f"n {tmp_path}/data/u0000.wav\n")
    cmd = options(data, tmp_path / "exp", "--iterator_type", "task")
    cmd += ["--batch_type", "numel", "--batch_bins", str(24 * RATE)]
    cmd += ["--num_iters_per_epoch", "20", "--noise_scp", f"{tmp_path}/noise.scp"]
    cmd += ["--mixer_conf", f"preset={mixing}"]
    if mixing == "noise":  # in place of what options() says
        cmd += ["--mixer_conf", "rules.speech.noise_prob=1.0"]
    if headroom is not None:
        cmd += ["--sampler_conf", f"mix_headroom_seconds={headroom}"]
    args = SpearTask.get_parser().parse_args(cmd)
    factory = SpearTask.build_iter_factory(args, DistributedOption(), "train")
    extension = 2.0 * (mixing == "token_mixing")
    assert factory.batches.sampler.headroom == RATE * (
        extension if headroom is None else headroom
    )
    mixer = SpearTask.build_model(args).mixer
    mixed, most = [], []
    for _, batch in factory.build_iter(1):
        codes = {name: batch[f"codes_{name}"] for name in args.teachers}
        names = ("noise", "noise_lengths")
        got = mixer(
            batch["speech"],
            batch["speech_lengths"],
            batch["domain"][:, 0],
            codes,
            *(batch[name] for name in names),
        )
        mixed.append(got.speech.numel())
        most.append(len(got.speech) * (batch["speech"].size(1) + extension * RATE))
    assert all(size <= bound for size, bound in zip(mixed, most, strict=True))
    assert (max(most) > 24 * RATE) == warns
    warned = [m for m in caplog.messages if "mix_headroom_seconds=0.5" in m]
    assert len(warned) == warns and all("1.5 s an utterance" in m for m in warned)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_validation_sees_everything_once(manifest: Manifest, world_size: int) -> None:
    batches = validation_batches(manifest.samples, 100 * RATE, 50, world_size)
    assert len(batches) % world_size == 0
    rows = np.concatenate(batches)
    assert sorted(rows) == list(range(len(manifest)))
    for batch in batches:
        assert 1 <= len(batch) <= 50
        assert len(batch) * int(manifest.samples[batch].max()) <= 100 * RATE
    with pytest.raises(DataDirError, match="raise valid_batch_bins"):
        validation_batches(manifest.samples, 10 * RATE, None, 1)
    with pytest.raises(DataDirError, match="2 batches .* 3 ranks cannot share"):
        validation_batches(np.array([5, 6]), 100, None, 3)
    with pytest.raises(DataDirError, match="9 utterances .* make 9 batches"):
        validation_batches(np.full(9, 80), 100, None, 4)

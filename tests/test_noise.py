"""Noise lists and the batches they get into."""

import pickle
import tracemalloc
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from espnet2.iterators.sequence_iter_factory import SequenceIterFactory

from espnet2_spear.data.noise import NoiseList, SpearCollateFn
from espnet2_spear.errors import UserError
from espnet2_spear.fileio.datadir import DataDirError
from espnet2_spear.tasks.spear import SpearTask
from espnet2_spear.train.batches import open_epoch

RATE = 16000


@pytest.fixture
def scp(tmp_path: Path) -> Path:
    """Five recordings, one of them at another rate, one longer than the rest."""
    lines = []
    for i, (rate, count) in enumerate(
        [(16000, 800)] * 3 + [(8000, 400), (16000, 6400)]
    ):
        path = tmp_path / f"n{i}.wav"
        soundfile.write(path, np.full(count, 0.1 * (i + 1)), rate)
        lines.append(f"n{i} {path}\n")
    scp = tmp_path / "noise.scp"
    scp.write_text("".join(lines))
    return scp


def data(*ids: str) -> list[tuple[str, dict[str, np.ndarray]]]:
    return [
        (
            utt,
            {
                "speech": np.ones(10 * i, dtype=np.float32),
                "codes_t": np.zeros((i, 2), dtype=np.int64),
                "domain": np.array([0]),
            },
        )
        for i, utt in enumerate(ids, 1)
    ]


class ByName(torch.utils.data.Dataset):
    """As ESPnet's: id -> (id, example)."""

    def __init__(self, examples: dict) -> None:
        self.examples = examples

    def __getitem__(self, utt: str) -> tuple[str, dict]:
        return utt, self.examples[utt]


def test_batches_carry_noise(scp: Path) -> None:
    collate = SpearCollateFn(NoiseList(scp, max_seconds=0.1), clips=30, seed=3)
    ids, batch = collate(data("a", "b"))
    assert ids == ["a", "b"] and "domain_lengths" not in batch
    assert batch["codes_t"][0].tolist() == [[0, 0], [-1, -1]]
    assert batch["noise"].shape == (30, 1600) and batch["noise"].dtype == torch.float32
    assert set(batch["noise_lengths"].tolist()) == {800, 1600}
    for clip, n in zip(batch["noise"], batch["noise_lengths"], strict=True):
        assert (clip[:n] > 0.05).all() and not clip[n:].any()
    levels = {round(clip[400].item(), 1) for clip in batch["noise"]}
    assert levels == {0.1, 0.2, 0.3, 0.4, 0.5}  # all of them, 8 kHz resampled


def test_every_iterator_draws_other_noise_each_epoch(scp: Path) -> None:
    """ESPnet's too, which tell nobody of the epoch."""
    collate = SpearCollateFn(NoiseList(scp), clips=12)
    batch = [("a",), ("b",)]
    dataset = ByName(dict(data("a", "b")))
    factory = SequenceIterFactory(dataset, batch, collate_fn=collate, shuffle=False)
    first, again, second = (
        next(open_epoch(factory, epoch)[0])[1]["noise"].mean(dim=1)
        for epoch in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_noise_depends_on_seed_epoch_and_utterances_only(scp: Path) -> None:
    def draw(seed: int, epoch: int, *ids: str, before: int = 0) -> torch.Tensor:
        collate = SpearCollateFn(NoiseList(scp), clips=12, seed=seed)
        collate.set_epoch(epoch)
        for _ in range(before):
            collate(data("x"))
        return collate(data(*ids))[1]["noise"].mean(dim=1)

    first = draw(0, 1, "a", "b")
    assert torch.equal(first, draw(0, 1, "a", "b", before=3))
    for other in (draw(1, 1, "a", "b"), draw(0, 2, "a", "b"), draw(0, 1, "b", "a")):
        assert not torch.equal(first, other)


def test_bad_recordings_are_skipped_and_counted(
    scp: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (scp.parent / "n1.wav").write_bytes(b"RIFF and nothing else")
    (scp.parent / "n4.wav").unlink()
    read = NoiseList._read

    def refuse(self: NoiseList, file: str, where: float) -> np.ndarray:
        if file.endswith("n2.wav"):
            raise PermissionError(13, "Permission denied", file)
        return read(self, file, where)

    monkeypatch.setattr(NoiseList, "_read", refuse)
    noise = NoiseList(scp)
    clips = noise.draw(np.random.default_rng(0), 50)
    assert {name for name, _ in clips} == {"n0", "n3"}
    assert set(noise.skipped) == {"n1", "n2", "n4"}
    assert "no such file" in noise.skipped["n4"]
    assert len(caplog.records) == 3 and "3 so far" in caplog.text
    # It makes no difference whether they are known to be bad.
    again = noise.draw(np.random.default_rng(0), 50)
    assert [name for name, _ in again] == [name for name, _ in clips]


def test_only_bad_recordings_are_fatal(scp: Path) -> None:
    for path in scp.parent.glob("*.wav"):
        path.unlink()
    with pytest.raises(UserError, match=r"noise.scp.*no such file"):
        SpearCollateFn(NoiseList(scp))(data("a"))


def test_a_list_that_goes_during_the_training(scp: Path) -> None:
    noise = NoiseList(scp)
    copy = pickle.dumps(noise)
    scp.write_text("")  # in place, as a full disk leaves it
    with pytest.raises(DataDirError, match="gone or was changed.*--resume true"):
        noise.draw(np.random.default_rng(0), 1)
    scp.unlink()
    with pytest.raises(UserError, match="no such list"):  # a worker that starts
        pickle.loads(copy)


def test_bad_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.scp: no such list.*data_musan"):
        NoiseList(tmp_path / "absent.scp")
    (tmp_path / "odd.scp").write_text("name\n")
    with pytest.raises(DataDirError, match="line 1"):
        NoiseList(tmp_path / "odd.scp")
    (tmp_path / "twice.scp").write_text("a x.wav\na y.wav\n")
    with pytest.raises(DataDirError, match="'a' appears twice"):
        NoiseList(tmp_path / "twice.scp")
    (tmp_path / "empty.scp").write_text("")
    with pytest.raises(UserError, match="no recordings"):
        NoiseList(tmp_path / "empty.scp")
    (tmp_path / "pipe.scp").write_text("a sox x.wav - |\n")
    with pytest.raises(UserError, match="'a' is a command"):
        NoiseList(tmp_path / "pipe.scp")


def test_long_lists_are_not_kept_as_objects(scp: Path) -> None:
    """Every rank and every worker has the list: 8 bytes a line, not 228."""
    count, file = 50_000, scp.parent / "n0.wav"
    lines = [f"noise-{i:07d} {file}\n" for i in range(count)]
    scp.write_text("".join(lines))
    tracemalloc.start()
    noise = NoiseList(scp)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(noise) == count and kept < 20 * count
    copy = pickle.loads(pickle.dumps(noise))  # of a worker that is no fork
    names = [name for name, _ in copy.draw(np.random.default_rng(0), 50)]
    # From anywhere in the list; the names are in its order.
    numbers = [int(name.removeprefix("noise-")) for name in names]
    expected, rng = [], np.random.default_rng(0)
    for _ in names:
        expected.append(int(rng.integers(count)))
        rng.random()  # where a long recording is cut
    assert numbers == expected


def options(**changes) -> Namespace:
    conf = {"mixer_conf": {"preset": "token_mixing"}, "noise_scp": None}
    conf |= {"noise_conf": {}, "seed": 5, "domains": ["speech", "audio"]}
    conf["multiple_iterator"] = False
    return Namespace(**conf | {"teachers": {"speech": {"num_codebooks": 2}}} | changes)


def test_the_task_wants_a_list_where_noise_is_mixed(scp: Path) -> None:
    with pytest.raises(ValueError, match="give --noise_scp"):
        SpearTask.build_collate_fn(options(), train=True)
    assert SpearTask.build_collate_fn(options(), train=False).noise is None
    quiet = {"preset": "token_mixing", "rules": {"speech": {"noise_prob": 0}}}
    for conf in ({}, quiet):
        collate = SpearTask.build_collate_fn(options(mixer_conf=conf), train=True)
        assert collate.noise is None
        for unused in ({"noise_scp": str(scp)}, {"noise_conf": {"clips": 2}}):
            args = options(mixer_conf=conf, **unused)
            with pytest.raises(ValueError, match="no rule of mixer_conf mixes noise"):
                SpearTask.build_collate_fn(args, train=True)
            assert SpearTask.build_collate_fn(args, train=False).noise is None
    args = options(noise_scp=str(scp), noise_conf={"clips": 2, "max_seconds": 1})
    collate = SpearTask.build_collate_fn(args, train=True)
    assert (collate.clips, collate.seed, len(collate.noise)) == (2, 5, 5)
    with pytest.raises(ValueError, match="multiple_iterator: .* in every epoch"):
        args = options(noise_scp=str(scp), multiple_iterator=True)
        SpearTask.build_collate_fn(args, train=True)
    with pytest.raises(ValueError, match="noise_conf: .*clip"):
        SpearTask.build_collate_fn(
            options(noise_scp=str(scp), noise_conf={"clip": 2}), train=True
        )

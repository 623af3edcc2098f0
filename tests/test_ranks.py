"""Trainings of two processes over gloo: resuming, skipping, and ranks that die."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from tiny_training import (
    RATE,
    difference,
    end,
    launch,
    options,
    train,
    with_other_audio,
    write_data,
    write_nan,
)

from espnet2_spear.tasks import spear
from espnet2_spear.train import checkpoint, step
from espnet2_spear.train.checkpoint import SKIPPED
from espnet2_spear.train.interruption import EXIT_INTERRUPTED
from espnet2_spear.train.ranks import EXIT_RANK_LOST

RANKS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_data(tmp_path_factory.mktemp("data"))


def wait_for(path: Path, processes: list) -> None:
    while not path.exists():
        assert all(p.is_alive() for p in processes)
        time.sleep(0.02)


@pytest.mark.second_env
def test_stopped_and_resumed(data, tmp_path, ranks: int = 3):
    """A signal to one rank stops all; what each rank remembers is its own.

    Bit by bit as without the interruption. Numbers of three ranks may add up to others
    in another order, which those of two cannot.
    """
    more = ("--batch_size", 4, "--accum_grad", 2)
    cmd = options(data, tmp_path / "exp", *more)

    def stop_one(rank):
        def before():
            def save_slowly(*args, **kwargs):
                time.sleep(2)
                whole(*args, **kwargs)
                (tmp_path / "saved").touch()

            def update(self, *args):
                if rank == 1 and self.state.steps == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                return plain(self, *args)

            plain = step.OptimizerStep._update
            step.OptimizerStep._update = update
            whole, checkpoint.save_whole = checkpoint.save_whole, save_slowly

        return before

    processes = launch(cmd, tmp_path, stop_one, ranks)
    processes[1].join(300)
    # The first that ends makes torch and srun end the others.
    assert (tmp_path / "saved").exists()
    assert end(processes) == [EXIT_INTERRUPTED] * ranks
    state = torch.load(tmp_path / "exp/checkpoint.pth", weights_only=True)["spear"]
    assert (state["epoch"], state["position"], state["steps"]) == (1, 3, 2)
    assert len(state["ranks"]) == ranks and state["ranks"][0] != state["ranks"][1]
    # Another number of processes may go on with it, and is told what that means.
    shutil.copytree(tmp_path / "exp", tmp_path / "alone", symlinks=True)
    alone = options(data, tmp_path / "alone", *more)
    assert train(alone, tmp_path / "log") == 0
    log = (tmp_path / "log").read_text()
    assert f"the interrupted run had {ranks} processes, this one has 1" in log
    assert "goes on after 3 batches of epoch 1" in log
    assert end(launch(cmd, tmp_path, ranks=ranks)) == [0] * ranks
    cmd = options(data, tmp_path / "whole", *more)
    assert end(launch(cmd, tmp_path, ranks=ranks)) == [0] * ranks
    for epoch in (1, 2):
        one, two = (tmp_path / name / f"{epoch}epoch.pth" for name in ("exp", "whole"))
        assert difference(one, two) == ""
    stats = torch.load(tmp_path / "whole/checkpoint.pth", weights_only=True)
    assert stats["reporter"]["stats"][1]["train"]["mask_ratio"] > 0.2


def test_skipped_by_all_ranks(data, tmp_path):
    """Rank 1 meets an utterance of nan; both skip, and rank 0 knows its name."""
    write_nan(data, tmp_path / "nan.wav", utt := "u0001")
    cmd = options(data, tmp_path / "exp", "--max_epoch", 1, "--batch_size", 4)
    cmd = with_other_audio(cmd, data, {utt: tmp_path / "nan.wav"})
    assert end(launch(cmd, tmp_path)) == [0] * RANKS
    skipped = (tmp_path / "exp" / SKIPPED).read_text().splitlines()
    assert len(skipped) == 1 and utt in skipped[0] and '"u0000"' not in skipped[0]
    for value in torch.load(tmp_path / "exp/1epoch.pth", weights_only=True).values():
        assert value.isfinite().all()


def test_unreadable_utterances_of_all_ranks_are_counted(data, tmp_path):
    (tmp_path / "empty.wav").write_bytes(b"")
    bad = dict.fromkeys([f"u{i:04d}" for i in range(0, 12, 3)], tmp_path / "empty.wav")
    cmd = options(data, tmp_path / "exp", "--max_epoch", 1, "--num_iters_per_epoch", 6)
    cmd += ["--iterator_type", "task", "--batch_type", "numel"]
    cmd += ["--batch_bins", str(12 * RATE)]
    cmd = with_other_audio(cmd, data, bad)
    assert end(launch(cmd, tmp_path)) == [0] * RANKS
    listed = [
        [line.split()[0] for line in path.read_text().splitlines()]
        for path in sorted((tmp_path / "exp").glob("skipped_train.rank*.txt"))
    ]
    assert len(listed) == RANKS and all(set(utts) <= set(bad) for utts in listed)
    count = sum(map(len, listed))
    state = torch.load(tmp_path / "exp/checkpoint.pth", weights_only=True)
    last = state["reporter"]["stats"][1]["train"]["skipped_utts"]
    assert 0 < last <= count
    assert f"skipped utterances: {count} |" in (tmp_path / "log0").read_text()


@pytest.mark.parametrize(
    "number, victim",
    [
        (signal.SIGKILL, 0),
        (signal.SIGKILL, 1),
        (signal.SIGSTOP, 0),
        (signal.SIGSTOP, 1),
    ],
)
def test_rank_that_dies_or_hangs_ends_the_other(data, tmp_path, victim, number):
    """A frozen process closes no connection: only its silence gives it away."""
    cmd = options(data, tmp_path / "exp", "--max_epoch", 10000)
    cmd += ["--rank_timeout", "5"]
    processes = launch(cmd, tmp_path)
    wait_for(tmp_path / "exp" / "2epoch.pth", processes)
    os.kill(processes[victim].pid, number)
    other = processes[1 - victim]
    other.join(120)
    end(processes, 0)
    log = (tmp_path / f"log{1 - victim}").read_text()
    if number == signal.SIGSTOP:
        assert other.exitcode == EXIT_RANK_LOST
        assert f"rank {victim} has been silent for" in log
        # All started again, as the message says: what it left does not count.
        last = torch.load(tmp_path / "exp/checkpoint.pth", weights_only=True)
        cmd += ["--max_epoch", str(last["spear"]["epoch"] + 5), "--rank_timeout", "2"]
        assert end(launch(cmd, tmp_path)) == [0] * RANKS
    else:
        assert other.exitcode not in (0, None)
        assert "another rank has died" in log or "ends, because" in log


@pytest.mark.second_env
@pytest.mark.parametrize("victim", [0, 1])
def test_rank_that_hangs_before_the_training_ends_the_other(data, tmp_path, victim):
    """While models are built nobody exchanges anything: the other would wait."""

    def freeze_one(rank):
        def before():
            def build(args):
                if rank != victim:
                    (tmp_path / "building").touch()
                    return plain(args)
                while not (tmp_path / "building").exists():
                    time.sleep(0.02)
                os.kill(os.getpid(), signal.SIGSTOP)

            plain = spear.build_mixer_config
            spear.build_mixer_config = build

        return before

    cmd = options(data, tmp_path / "exp", "--rank_timeout", 5)
    processes = launch(cmd, tmp_path, freeze_one)
    other = processes[1 - victim]
    other.join(120)
    code = other.exitcode
    end(processes, 0)
    log = (tmp_path / f"log{1 - victim}").read_text()
    assert code == EXIT_RANK_LOST, log
    assert f"rank {victim} has been silent for" in log


def test_rank_that_fails_before_the_training_ends_the_other(data, tmp_path):
    """And the other says why."""

    def fail_one(rank):
        def before():
            def build(args):
                if rank == 1:
                    raise ValueError("this node lacks a file")
                time.sleep(60)  # as if it waited for the other

            spear.build_mixer_config = build

        return before

    cmd = options(data, tmp_path / "exp", "--rank_timeout", 8)
    codes = end(launch(cmd, tmp_path, fail_one), 120)
    log = (tmp_path / "log0").read_text()
    assert codes == [EXIT_RANK_LOST, 1], log
    assert "rank 1 failed: ValueError: this node lacks a file" in log

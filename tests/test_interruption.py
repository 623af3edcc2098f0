"""Signals to the process that only waits for its ranks."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from espnet2.tasks.abs_task import AbsTask
from tiny_training import FORK
from torch.multiprocessing.spawn import ProcessContext

from espnet2_spear.tasks.spear import SpearTask
from espnet2_spear.train.interruption import (
    EXIT_INTERRUPTED,
    Interrupted,
    StopRequest,
)

pytestmark = pytest.mark.second_env


def rank(folder: Path, number: int) -> None:
    """Stop as a training does, which would need GPUs."""
    with StopRequest().listen() as stop:
        (folder / f"started{number}").touch()
        while not stop.requested:
            time.sleep(0.01)
        time.sleep(0.2 * number)
        (folder / f"saved{number}").touch()
        raise Interrupted


def launch(folder: Path, ranks: int) -> None:
    """Wait for ranks in ESPnet's way; they are real processes."""

    def main(args: object = None, cmd: object = None) -> None:
        if ranks == 0:
            (folder / "started0").touch()
            time.sleep(60)
        jobs = [FORK.Process(target=rank, args=(folder, n)) for n in range(ranks)]
        for job in jobs:
            job.start()
        files = [str(folder / f"error{n}") for n in range(ranks)]
        while not ProcessContext(jobs, files).join():
            pass

    torch.set_num_threads(1)
    AbsTask.main = main
    SpearTask.main()


@pytest.mark.parametrize("ranks", [0, 2])
def test_ranks_stop_and_save(tmp_path: Path, ranks: int) -> None:
    process = FORK.Process(target=launch, args=(tmp_path, ranks))
    process.start()
    while len(list(tmp_path.glob("started*"))) < max(ranks, 1):
        assert process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    process.join(300)
    assert process.exitcode == (EXIT_INTERRUPTED if ranks else -signal.SIGTERM)
    assert len(list(tmp_path.glob("saved*"))) == ranks

"""Signals to the process that only waits for its ranks."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from espnet2_spear.train.interruption import EXIT_INTERRUPTED

pytestmark = pytest.mark.second_env

# The ranks are real processes that ESPnet's way of waiting waits for; in place of a
# training, which would need GPUs, they stop as one does.
SCRIPT = """
import sys, time
from pathlib import Path
import torch
from espnet2.tasks.abs_task import AbsTask
from torch.multiprocessing.spawn import ProcessContext
from espnet2_spear.tasks.spear import SpearTask
from espnet2_spear.train.interruption import Interrupted, StopRequest

folder = Path("{folder}")

def rank(number):
    with StopRequest().listen() as stop:
        (folder / f"started{{number}}").touch()
        while not stop.requested:
            time.sleep(0.01)
        time.sleep(0.2 * number)
        (folder / f"saved{{number}}").touch()
        raise Interrupted

def main(args=None, cmd=None):
    if {alone}:
        (folder / "started0").touch()
        (folder / "started1").touch()
        time.sleep(60)
    mp = torch.multiprocessing.get_context("fork")
    ranks = [mp.Process(target=rank, args=(number,)) for number in range(2)]
    for process in ranks:
        process.start()
    files = [str(folder / f"error{{number}}") for number in range(2)]
    while not ProcessContext(ranks, files).join():
        pass

AbsTask.main = main
SpearTask.main()
"""


@pytest.mark.parametrize("alone", [False, True])
def test_ranks_stop_and_save(tmp_path: Path, alone: bool) -> None:
    script = SCRIPT.format(folder=tmp_path, alone=alone)
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("started*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code = process.wait(30)
    assert code == (-signal.SIGTERM if alone else EXIT_INTERRUPTED)
    assert len(list(tmp_path.glob("saved*"))) == (0 if alone else 2)

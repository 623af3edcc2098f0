"""The process group and its threads end before the process does."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.second_env

SCRIPT = """
from pathlib import Path
import torch
from espnet2_spear.train.process_group import process_group_that_ends

def gloo_threads():
    tasks = Path("/proc/self/task").iterdir()
    return sum("gloo" in (task / "comm").read_text() for task in tasks)

def train():
    # The locals of this function live as long as an exception that leaves it.
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
    model.itself = [model]
    model(torch.ones(2, 3)).sum().backward()
    torch.optim.Adam(model.parameters()).step()
    assert gloo_threads() > 0
    {end}

def main():
    with process_group_that_ends():
        torch.distributed.init_process_group(
            "gloo", init_method="file://{folder}/store", rank=0, world_size=1
        )
        train()

try:
    main()
except (SystemExit, ValueError):
    print(gloo_threads())
else:
    print(gloo_threads())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc")
@pytest.mark.parametrize("end", ["pass", "raise SystemExit(75)", "raise ValueError"])
def test_threads_end_with_the_group(tmp_path, end):
    script = SCRIPT.format(folder=tmp_path, end=end)
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    threads = int(run.stdout)
    assert threads == 0 if end != "raise ValueError" else threads > 0

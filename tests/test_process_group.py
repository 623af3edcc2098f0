"""The process group and its threads end before the process does."""

from pathlib import Path

import pytest
import torch
from tiny_training import FORK

from espnet2_spear.train.ranks import destroy_process_group_on_exit

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc")


def gloo_threads() -> int:
    tasks = Path("/proc/self/task").iterdir()
    return sum("gloo" in (task / "comm").read_text() for task in tasks)


def train(end: BaseException | None) -> None:
    # The locals of this function live as long as an exception that leaves it.
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
    model.itself = [model]
    model(torch.ones(2, 3)).sum().backward()
    torch.optim.Adam(model.parameters()).step()
    assert gloo_threads() > 0
    if end is not None:
        raise end


def work(folder: Path, end: BaseException | None) -> None:
    torch.set_num_threads(1)
    try:
        with destroy_process_group_on_exit():
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
            )
            train(end)
    except (SystemExit, ValueError):
        pass
    (folder / "threads").write_text(str(gloo_threads()))


@pytest.mark.parametrize("end", [None, SystemExit(75), ValueError()], ids=repr)
def test_threads_end_with_the_group(tmp_path: Path, end: BaseException | None) -> None:
    process = FORK.Process(target=work, args=(tmp_path, end))
    process.start()
    process.join(300)
    threads = int((tmp_path / "threads").read_text())
    if isinstance(end, ValueError):  # its end could wait for ranks that are gone
        assert threads > 0
    else:
        assert process.exitcode == 0 and threads == 0

"""What the benchmarks share: fresh processes, time, memory, speed of a device."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MIB, GIB = 2**20, 2**30


def fresh(function: Callable, *args: Any) -> Any:
    """Call a function of a module where nothing was allocated before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that work() took, and what it returned."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - start, result


CPU = torch.device("cpu")


def in_turn(
    work: dict[Any, Callable], trials: int, device: torch.device = CPU
) -> dict[Any, list[float]]:
    """Seconds of some calls, each so many times, one after the other.

    The first of each does not count.
    """
    times: dict[Any, list[float]] = {name: [] for name in work}
    for trial in range(trials + 1):
        for name, call in work.items():
            seconds, _ = timed(call, device)
            if trial:
                times[name].append(seconds)
    return times


def product_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a large matrix product, the best of five."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = min(timed(lambda: a @ a, device)[0] for _ in range(6))
    return 2 * side**3 / best


def memory(pid: int | str = "self") -> tuple[float, float]:
    """Resident memory of a process in MB, and the part that no file backs."""
    values = {}
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as lines:
        for line in lines:
            name, _, rest = line.partition(":")
            if rest.endswith("kB\n"):
                values[name] = int(rest.split()[0]) / 1024
    return values["Rss"], values["Anonymous"]


def resident() -> int:
    """Resident memory of this process, in bytes."""
    return _status("VmRSS")


def reset_peak(device: torch.device) -> None:
    """Begin to measure the peak of memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def read_peak(device: torch.device) -> int:
    """Peak in bytes: allocated on the GPU, else resident of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


@contextlib.contextmanager
def kept_bytes(others: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Storages that autograd keeps for the backward pass, and their bytes.

    Args:
        others: such as parameters, which do not count.
    """
    known = {x.untyped_storage().data_ptr() for x in others}
    kept: dict[int, int] = {}
    alive = []

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


def read_audio(wav_scp: Path, samples: int) -> Tensor:
    """Recordings one after the other, (1, samples); repeated if there are too few."""
    from espnet2_spear.fileio import audio, datadir

    paths = datadir.read_table(wav_scp, "utterance file").values()
    pieces: list[Tensor] = []
    while sum(map(len, pieces)) < samples:
        pieces += [torch.from_numpy(audio.read_audio(path)[0]) for path in paths]
    return torch.cat(pieces)[None, :samples]

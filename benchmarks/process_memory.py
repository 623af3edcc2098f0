"""Memory of a process, for the benchmarks."""

from __future__ import annotations


def memory(pid: int | str = "self") -> tuple[float, float]:
    """Resident memory of a process in MB, and the part that no file backs."""
    values = {}
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as lines:
        for line in lines:
            name, _, rest = line.partition(":")
            if rest.endswith("kB\n"):
                values[name] = int(rest.split()[0]) / 1024
    return values["Rss"], values["Anonymous"]

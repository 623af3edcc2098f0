#!/usr/bin/env python3
"""Train the tiny student while it is killed, stopped and starved of disk at random.

A training that nothing happens to comes first; then the same training, with a fault
every few seconds, is started again and again until it has finished; at the end the
parameters of both must be equal bit by bit. One utterance of the data is nan, so that
steps are skipped in both.

    python benchmarks/soak.py --minutes 30
"""

import argparse
import collections
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny_training import RATE, difference, options, start, train, write_data  # noqa: E402

from espnet2_spear.train.step import SKIPPED  # noqa: E402

SIGNALS = (signal.SIGKILL, signal.SIGTERM)
DISK = "disk full"


def full_disk() -> None:
    """Checkpoints cannot be written in this process, logs can."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def spoil(data: dict[str, str]) -> None:
    """Make one utterance nan."""
    line = Path(data["speech"]).read_text().splitlines()[3]
    path = line.split(maxsplit=1)[1]
    samples = soundfile.info(path).frames
    nan = np.full(samples, np.nan, dtype=np.float32)
    soundfile.write(path, nan, RATE, subtype="FLOAT")


def main(cmd=None) -> int:
    """Return 0 if the parameters are equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="About; [30]")
    parser.add_argument("--seed", type=int, default=0, help="Of the faults")
    parser.add_argument("--num_workers", type=int, default=0, help="Of the loader")
    args = parser.parse_args(cmd)
    rng = random.Random(args.seed)
    counts: collections.Counter = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = write_data(root / "data", 40)
        spoil(data)
        more = ("--save_interval", 7, "--num_workers", args.num_workers)

        def run(name: str, epochs: int) -> list[str]:
            return options(data, root / name, "--max_epoch", epochs, *more)

        begin = time.monotonic()
        if train(run("probe", 10), root / "probe.log"):
            print((root / "probe.log").read_text()[-2000:])
            return 1
        # Every start costs about as much as two epochs: aim at a third of the time.
        epoch = (time.monotonic() - begin) / 10
        epochs = max(10, round(args.minutes * 60 / 3 / epoch))
        if train(run("whole", epochs), root / "whole.log"):
            return 1
        deadline = begin + args.minutes * 60
        while True:
            quiet = time.monotonic() > deadline
            fault = None if quiet else rng.choice([*SIGNALS, *SIGNALS, DISK])
            before = full_disk if fault == DISK else lambda: None
            process = start(run("faulty", epochs), root / "faulty.log", before)
            process.join(None if quiet else rng.uniform(1.0, 6.0 + epoch * 5))
            ended_itself = process.exitcode is not None
            if not ended_itself:
                number = signal.SIGKILL if fault == DISK else fault
                process.kill() if number == signal.SIGKILL else process.terminate()
                process.join()
            name = fault if fault in (None, DISK) else signal.Signals(fault).name
            if process.exitcode == 0 and fault in SIGNALS:
                name = None  # it was done before
            counts[(name or "none", process.exitcode)] += 1
            if process.exitcode == 0:
                break
            if quiet:
                print((root / "faulty.log").read_text()[-2000:])
                return 1
        log = (root / "faulty.log").read_text()
        print("| fault | exit code | times |\n|---|--:|--:|")
        for (name, code), count in sorted(counts.items(), key=str):
            print(f"| {name} | {code} | {count} |")
        last = f"{epochs}epoch.pth"
        differs = difference(root / "whole" / last, root / "faulty" / last)
        lines = len((root / "faulty" / SKIPPED).read_text().splitlines())
        resumed = log.count("training goes on after")
        print(
            f"\n{epochs} epochs of 20 steps; resumed {resumed} times, "
            f"{log.count('without this checkpoint')} checkpoints left out, "
            f"{lines} steps skipped (repeated ones included), "
            f"{(time.monotonic() - begin) / 60:.1f} minutes"
        )
        print(f"parameters: {'DIFFERENT ' + differs if differs else 'equal'}")
        return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main())

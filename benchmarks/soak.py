#!/usr/bin/env python3
"""Train the tiny student while it is killed, stopped and starved of disk at random.

In each round a training that nothing happens to comes first; then the same training,
with a fault every few seconds, is started again and again until it has finished; the
parameters of both must be equal bit by bit. In both, one audio file is nan, one is cut
short, and one entry of codes is another utterance's: these three are left out and
listed. Rounds follow until the time is over.

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

from espnet2_spear.fileio.explain import option_parser  # noqa: E402

SIGNALS = (signal.SIGKILL, signal.SIGTERM)
DISK = "disk full"
UTTS, STEPS = 40, 20  # steps of an epoch
NAN, CUT, OTHERS = 3, 8, 15  # utterances


def full_disk() -> None:
    """Checkpoints cannot be written in this process, logs can."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def spoil(data: dict[str, str]) -> None:
    """Damage three utterances, see above."""
    paths = [x.split()[1] for x in Path(data["speech"]).read_text().splitlines()]
    nan = np.full(soundfile.info(paths[NAN]).frames, np.nan, dtype=np.float32)
    soundfile.write(paths[NAN], nan, RATE, subtype="FLOAT")
    content = Path(paths[CUT]).read_bytes()
    Path(paths[CUT]).write_bytes(content[: len(content) // 2])
    scp = Path(data["codes_speech"])
    lines = scp.read_text().splitlines()
    # The shortest utterance's codes are too few for any other one.
    sizes = [int(x.split()[1]) for x in Path(data["shape"]).read_text().splitlines()]
    shortest = lines[sizes.index(min(sizes))].split()[1]
    lines[OTHERS] = f"{lines[OTHERS].split()[0]} {shortest}"
    scp.write_text("\n".join(lines) + "\n")


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = option_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="at least")
    parser.add_argument("--epochs", type=int, default=30, help="of a training")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--num_workers", type=int, default=0, help="of the loader")
    return parser


def soak(cmd: list[str], log: Path, rng, counts) -> bool:
    """Start a training until it has finished; whether it did without an odd end."""
    while True:
        fault = rng.choice([*SIGNALS, *SIGNALS, DISK])
        process = start(cmd, log, full_disk if fault == DISK else lambda: None)
        process.join(rng.uniform(2.0, 12.0))
        if process.exitcode is None:
            process.terminate() if fault == signal.SIGTERM else process.kill()
            process.join()
        name = fault if fault == DISK else signal.Signals(fault).name
        if process.exitcode == 0:
            counts["finished", 0] += 1
            return True
        counts[name, process.exitcode] += 1
        allowed = {signal.SIGTERM: (75, -signal.SIGTERM), signal.SIGKILL: (-9,)}
        # With a full disk the end of an epoch ends the training, with a message.
        if process.exitcode not in allowed.get(fault, (1, -9)):
            return False


def main(cmd=None) -> int:
    """Return 0 if the parameters are equal."""
    args = get_parser().parse_args(cmd)
    rng = random.Random(args.seed)
    counts: collections.Counter = collections.Counter()
    totals: collections.Counter = collections.Counter()
    begin = time.monotonic()
    rounds, differs = 0, ""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = write_data(root / "data", UTTS)
        spoil(data)
        more = ["--iterator_type", "task", "--batch_type", "numel"]
        more += ["--batch_bins", 9 * RATE, "--num_iters_per_epoch", STEPS]
        more += ["--bad_data_conf", "max_share=0.2", "--save_interval", 7]
        more += ["--max_epoch", args.epochs, "--num_workers", args.num_workers]
        while not differs and time.monotonic() - begin < args.minutes * 60:
            rounds += 1
            more += ["--seed", args.seed + rounds]
            names = [root / f"{name}{rounds}" for name in ("whole", "faulty")]
            whole, faulty = names
            logs = [name.with_suffix(".log") for name in names]
            if train(options(data, whole, *more), logs[0]):
                print(logs[0].read_text()[-2000:])
                return 1
            if not soak(options(data, faulty, *more), logs[1], rng, counts):
                print(logs[1].read_text()[-2000:])
                return 1
            differs = difference(*(name / f"{args.epochs}epoch.pth" for name in names))
            text = logs[1].read_text()
            totals["resumed"] += text.count("training goes on after")
            totals["left_out"] += text.count("without this checkpoint")
            for name in ("whole", "faulty"):
                path = root / f"{name}{rounds}"
                listed = (path / "skipped_train.rank0.txt").read_text().splitlines()
                totals[f"unreadable_{name}"] += len(listed)
    print("| fault | exit code | times |\n|---|--:|--:|")
    for (name, code), count in sorted(counts.items(), key=str):
        print(f"| {name} | {code} | {count} |")
    print(
        f"\n{rounds} trainings of {args.epochs} epochs of {STEPS} steps, each twice; "
        f"resumed {totals['resumed']} times, {totals['left_out']} checkpoints left "
        f"out; utterances listed as unreadable: {totals['unreadable_whole']} and "
        f"{totals['unreadable_faulty']}; {(time.monotonic() - begin) / 60:.1f} minutes"
    )
    print(f"parameters: {'DIFFERENT ' + differs if differs else 'equal'}")
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main())

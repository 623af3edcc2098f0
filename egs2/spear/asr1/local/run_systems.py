#!/usr/bin/env python3
"""Train, decode and score several recognizers: systems x seeds.

Each is `run.sh --stage 3 --stop_stage 5` with its configuration, seed and tag, so that
what is finished is skipped and what was interrupted goes on.
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import asr_table


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--systems",
        nargs="+",
        default=["logmel", "spear_frozen", "spear_finetune"],
        help="conf/train_asr_<system>.yaml",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="Recognizers at once")
    parser.add_argument("--ckpt", help="Pre-trained student")
    parser.add_argument("--expdir", type=Path, default=Path("exp"))
    parser.add_argument("--table", type=Path, help="Markdown table (and .json)")
    parser.add_argument("--score_set", default="en_test", help="Set of the table")
    parser.add_argument("run_args", nargs="*", help="After --: options of run.sh")
    return parser


class Runs:
    """Calls of run.sh, which end with this process.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.running: set[subprocess.Popen] = set()
        self.stopped = False

    def __call__(self, system: str, seed: int) -> bool:
        """Train, decode and score one recognizer; whether that went well."""
        tag, args = f"{system}_s{seed}", self.args
        log = args.expdir / f"asr_{tag}" / "run.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        cmd = ["./run.sh", "--stage", "3", "--stop_stage", "5", "--asr_tag", tag]
        cmd += ["--asr_config", f"conf/train_asr_{system}.yaml", "--seed", str(seed)]
        cmd += ["--expdir", str(args.expdir), *args.run_args]
        if args.ckpt is not None:
            cmd += ["--ckpt", args.ckpt]
        start = time.monotonic()
        with log.open("a") as stream:
            if self.stopped:
                return False
            print("#", shlex.join(cmd), file=stream, flush=True)
            # A session of its own: a signal reaches all that run.sh has started.
            process = subprocess.Popen(
                cmd, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
            self.running.add(process)
            if self.stopped:  # since the check above
                self.stop()
            status = process.wait()
            self.running.discard(process)
        minutes = (time.monotonic() - start) / 60
        if status == 0:
            print(f"{tag}: done in {minutes:.1f} minutes", flush=True)
        else:
            last = log.read_text(errors="replace").splitlines()[-1]
            print(f"{tag}: FAILED, see {log}: {last}", flush=True)
        return status == 0

    def stop(self) -> None:
        """End what is running."""
        self.stopped = True
        for process in list(self.running):
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, signal.SIGTERM)


def stop(number: int, _: object) -> None:
    """Signal handler: end once, undisturbed by a signal that follows."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> None:
    args = get_parser().parse_args()
    runs = Runs(args)
    signal.signal(signal.SIGTERM, stop)
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            # All seeds of a system before the next would leave slow ones to the end.
            jobs = [
                pool.submit(runs, system, seed)
                for seed in args.seeds
                for system in reversed(args.systems)
            ]
            good = [job.result() for job in jobs]
        except BaseException:
            runs.stop()
            raise
    if not all(good):
        sys.exit(f"run_systems.py: {good.count(False)} of {len(good)} failed")
    folders = [
        args.expdir / f"asr_{s}_s{seed}" for s in args.systems for seed in args.seeds
    ]
    cmd = ["--score_set", args.score_set, "--exp_dirs", *map(str, folders)]
    if args.table is not None:
        args.table.parent.mkdir(parents=True, exist_ok=True)
        cmd += ["--output", str(args.table)]
        cmd += ["--json", str(args.table.with_suffix(".json"))]
    asr_table.main(cmd)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Train, decode and score several recognizers: systems x seeds.

What is run is what `run.sh --stage 3 --stop_stage 5` prints for each of them with
--dry_run true, so nothing is decided here; ESPnet is imported once, and every
recognizer gets a process forked from this one, which saves its slow start. Recognizers
that are scored already are skipped.
"""

import argparse
import importlib
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import espnet2_spear  # noqa: F401  (makes frontend spear known to ESPnet)


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


def commands(args: argparse.Namespace, system: str, seed: int, exp_tag: str) -> list:
    """Ask run.sh what it would run; a list of (log, module, arguments).

    What a listing has of a step: its command, who runs it (the log comes last), what
    it reads and writes, and whether it would be run.
    """
    cmd = ["./run.sh", "--stage", "3", "--stop_stage", "5", "--dry_run", "true"]
    cmd += ["--asr_config", f"conf/train_asr_{system}.yaml", "--seed", str(seed)]
    cmd += ["--asr_tag", exp_tag, "--expdir", str(args.expdir), *args.run_args]
    if args.ckpt is not None:
        cmd += ["--ckpt", args.ckpt]
    done = subprocess.run(cmd, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"run_systems.py: {shlex.join(cmd)} failed\n{done.stdout}")
    found = []
    for line in done.stdout.splitlines():
        if line.startswith("  $ "):
            words = shlex.split(line)[1:]
            at = max(i for i, word in enumerate(words) if word == "-m")
            module, rest = words[at + 1], words[at + 2 :]
        elif line.startswith("      by "):
            log = Path(shlex.split(line)[-1])
        elif line.startswith("      would run"):
            found.append((log, module, rest))
    return found


def work(jobs: list) -> None:
    """Run modules one after the other, each with its log, in a forked process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for log, module, rest in jobs:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        sys.argv = [module, *rest]
        print("#", shlex.join(sys.argv), flush=True)
        importlib.import_module(module).main(rest)
        sys.stdout.flush()


def main() -> None:
    args = get_parser().parse_args()
    for module in ("espnet2.bin.asr_train", "espnet2_spear.bin.asr_score"):
        importlib.import_module(module)
    context = multiprocessing.get_context("fork")
    # All seeds of a system before the next would leave the slow ones to the end.
    waiting = [(s, seed) for seed in args.seeds for s in reversed(args.systems)]
    folders = [
        args.expdir / f"asr_{s}_s{seed}" for s in args.systems for seed in args.seeds
    ]
    failed = []
    running: dict = {}
    # Killed, it takes the recognizers in training with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                system, seed = waiting.pop(0)
                tag = f"{system}_s{seed}"
                if (args.expdir / f"asr_{tag}" / "score.json").exists():
                    print(f"{tag}: done before", flush=True)
                    continue
                jobs = commands(args, system, seed, tag)
                process = context.Process(target=work, args=(jobs,))
                process.start()
                running[process] = (tag, jobs[0][0], time.monotonic())
            for process in [p for p in running if not p.is_alive()]:
                tag, log, start = running.pop(process)
                minutes = (time.monotonic() - start) / 60
                state = "done" if process.exitcode == 0 else "FAILED"
                print(f"{tag}: {state} in {minutes:.1f} minutes", flush=True)
                if process.exitcode != 0:
                    failed.append(f"{tag} (see the logs beside {log})")
            time.sleep(0.2)
    finally:
        for process in running:
            process.terminate()
    if failed:
        sys.exit(f"run_systems.py: failed: {', '.join(failed)}")
    cmd = ["--score_set", args.score_set, "--exp_dirs", *map(str, folders)]
    if args.table is not None:
        args.table.parent.mkdir(parents=True, exist_ok=True)
        cmd += ["--output", str(args.table)]
        cmd += ["--json", str(args.table.with_suffix(".json"))]
    importlib.import_module("espnet2_spear.bin.asr_table").main(cmd)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Train, decode and score several recognizers: systems x seeds.

Each is `run.sh --stage 3 --stop_stage 5` with its configuration, seed and tag, so that
what is finished is skipped and what was interrupted goes on.
"""

import argparse
import sys
from pathlib import Path

import asr_table
from lanes import Job, Lanes, visible_gpus


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
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


def job(args: argparse.Namespace, system: str, seed: int) -> Job:
    """Train, decode and score one recognizer."""
    tag = f"{system}_s{seed}"
    command = ["./run.sh", "--stage", "3", "--stop_stage", "5", "--asr_tag", tag]
    command += ["--asr_config", f"conf/train_asr_{system}.yaml", "--seed", str(seed)]
    command += ["--expdir", str(args.expdir), *args.run_args]
    if args.ckpt is not None:
        command += ["--ckpt", args.ckpt]
    return Job(tag, [command], args.expdir / f"asr_{tag}" / "run.log")


def main() -> None:
    """Run all, then print the table."""
    args = get_parser().parse_args()
    # All seeds of a system before the next would leave slow ones to the end.
    failed = Lanes(args.jobs, visible_gpus()).run(
        [job(args, s, seed) for seed in args.seeds for s in reversed(args.systems)]
    )
    if failed:
        sys.exit(failed)
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

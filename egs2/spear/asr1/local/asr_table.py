#!/usr/bin/env python3
"""Compare recognizers over seeds: one Markdown table, and the same as JSON."""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from espnet2_spear.errors import UserError
from espnet2_spear.fileio.atomic import write_json
from espnet2_spear.fileio.explain import command


class TableError(UserError):
    """Scores that cannot be put into one table; names the file and the remedy."""


def read_scores(folders: list[Path], score_set: str) -> list[dict[str, Any]]:
    """Read ``score.json`` of each recognizer.

    Returns:
        one dict per recognizer: system, seed, wer, cer (percent), minutes (of
        training, None if not known).
    """
    runs = []
    for folder in folders:
        path = folder / "score.json"
        if not path.exists():
            raise TableError(f"{path}: no such file; score this recognizer (stage 5)")
        score = json.loads(path.read_text(encoding="utf-8"))
        if score_set not in score["sets"]:
            known = ", ".join(sorted(score["sets"]))
            raise TableError(f"{path}: no set '{score_set}', it has {known}")
        rates = score["sets"][score_set]
        runs.append(
            {
                "system": score["system"] or folder.name,
                "seed": score["seed"],
                "wer": rates["wer"]["rate"],
                "cer": rates["cer"]["rate"],
                "minutes": score.get("train_minutes"),
            }
        )
    return runs


def summarise(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and sample standard deviation over the seeds of each system."""
    systems: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        systems[run["system"]].append(run)
    summary: dict[str, dict[str, Any]] = {}
    for name, members in systems.items():
        seeds = [m["seed"] for m in members]
        if len(set(seeds)) != len(seeds):
            raise TableError(f"{name}: the same seed twice ({seeds}); name runs once")
        summary[name] = {"seeds": seeds}
        for key in ("wer", "cer", "minutes"):
            values = [m[key] for m in members if m[key] is not None]
            summary[name][key] = {
                "values": values,
                "mean": statistics.fmean(values) if values else None,
                "std": statistics.stdev(values) if len(values) > 1 else None,
            }
    return summary


def markdown(summary: dict[str, dict[str, Any]]) -> str:
    """Table of the systems in the order given; rates in percent."""
    lines = [
        "|system|seeds|WER|CER|training minutes|WER of each seed|",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in summary.items():
        cells = [name, str(len(entry["seeds"]))]
        cells += [_spread(entry[key]) for key in ("wer", "cer", "minutes")]
        cells.append(", ".join(f"{v:.1f}" for v in entry["wer"]["values"]))
        lines.append("|" + "|".join(cells) + "|")
    return "\n".join(lines) + "\n"


def _spread(stats: dict[str, Any]) -> str:
    if stats["mean"] is None:
        return "-"
    if stats["std"] is None:
        return f"{stats['mean']:.1f}"
    return f"{stats['mean']:.1f} ± {stats['std']:.1f}"


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        description="Table of WER, CER and minutes, mean and spread over seeds",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--exp_dirs", type=Path, nargs="+", required=True, help="Scored recognizers"
    )
    parser.add_argument("--score_set", default="en_test", help="Set to compare on")
    parser.add_argument("--output", type=Path, help="Markdown file (also printed)")
    parser.add_argument("--json", type=Path, help="JSON file")
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Print the table; see ``--help``."""
    summary = summarise(read_scores(args.exp_dirs, args.score_set))
    table = markdown(summary)
    print(table, end="")
    if args.output is not None:
        args.output.write_text(table, encoding="utf-8")
    if args.json is not None:
        write_json(args.json, summary)


if __name__ == "__main__":
    main()

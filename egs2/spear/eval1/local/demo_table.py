#!/usr/bin/env python3
"""One table of the demo: word error rates (asr1) and frozen features (eval1)."""

import argparse
import json
from pathlib import Path
from typing import Any

from heads import Score
from table import METRIC, read_scores, spread, with_error
from tasks import Task

# System of eval1 -> systems of asr1 that hear with it.
RECOGNIZERS = {
    "log-mel": {"log-mel": "logmel"},
    "student": {
        "student, frozen": "spear_frozen",
        "student, fine-tuned": "spear_finetune",
    },
}


def rows(
    features: dict[str, dict[str, list[Score]]], asr: dict[str, Any], tasks: list[Task]
) -> list[list[str]]:
    """A row a system: its name, word error rate, and a cell a task."""
    found = []
    for system, scores in features.items():
        cells = [with_error(scores[task.name]) for task in tasks]
        for title, name in RECOGNIZERS.get(system, {system: None}).items():
            wer = "-"
            if name is not None:
                values = asr[name]["wer"]["values"]
                wer = spread([Score(i, v, v, []) for i, v in enumerate(values)])
            # Features are those of the frozen student.
            own = ["-"] * len(tasks) if title.endswith("fine-tuned") else cells
            found.append([title, wer, *own])
    return found


def main(cmd: list[str] | None = None) -> None:
    """Print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--asr", type=Path, required=True, help="table.json of asr1")
    parser.add_argument("--features", type=Path, required=True, help="RESULTS.json")
    parser.add_argument("--tasks", nargs="+", required=True, help="names in tasks/")
    parser.add_argument("--output", type=Path, required=True, help="Markdown")
    args = parser.parse_args(cmd)
    folder = Path(__file__).resolve().parent.parent / "tasks"
    tasks = [Task.read(folder / f"{name}.yaml") for name in args.tasks]
    features = read_scores(args.features)
    asr = json.loads(args.asr.read_text())
    heads = ["system", "recognition, WER, %"]
    heads += [f"{task.title}, {METRIC[task.metric]}" for task in tasks]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]
    lines += [f"| {' | '.join(row)} |" for row in rows(features, asr, tasks)]
    lines += ["", "±: of recognition the standard deviation of several seeds, else the"]
    lines[-1] += " standard error over the test clips."
    text = "\n".join(lines) + "\n"
    args.output.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()

"""The table of all systems and tasks, in Markdown, and its picture."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from heads import Score
from scipy.stats import rankdata
from tasks import DOMAINS, LOWER_IS_BETTER, Task

Results = Mapping[
    str, Mapping[str, Sequence[Score]]
]  # title of system -> task -> seeds
METRIC = {
    "accuracy": "accuracy, %",
    "map": "mAP, %",
    "cer": "CER, % (lower is better)",
    "fer": "frame errors, % (lower is better)",
}


def read_scores(path: Path) -> dict[str, dict[str, list[Score]]]:
    """RESULTS.json of an evaluation: system -> task -> a score a seed of the probe."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return {
        system: {name: [Score(**s) for s in scores] for name, scores in tasks.items()}
        for system, tasks in content.items()
    }


def with_error(scores: Sequence[Score]) -> str:
    """Mean over the seeds, and its standard error: of the clips and of the seeds."""
    if not scores:
        return "-"
    error = standard_error(scores)
    mean = f"{statistics.fmean(s.test for s in scores):.1f}"
    return f"{mean} ± {error:.1f}" if error else mean


def standard_error(scores: Sequence[Score]) -> float:
    """Of their mean: all seeds are tested on the same clips."""
    clips = statistics.fmean(s.error**2 for s in scores)
    seeds = statistics.variance(s.test for s in scores) if len(scores) > 1 else 0.0
    return (clips + seeds / len(scores)) ** 0.5


def spread(scores: Sequence[Score]) -> str:
    """Mean and standard deviation over the seeds."""
    values = [score.test for score in scores]
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def mean_ranks(
    tasks: Sequence[Task], results: Results
) -> dict[str, list[float | None]]:
    """Mean rank of every system over speech, audio and all tasks; 1 is the best.

    Tasks that differ in nothing but their noise count as one.
    """
    systems = list(results)
    # All of a task but its noise -> ranks of all systems, a list a task.
    ranks: dict[tuple[str, ...], list[list[float]]] = defaultdict(list)
    for task in tasks:
        means = [
            statistics.fmean(s.test for s in results[system][task.name])
            for system in systems
        ]
        sign = 1 if task.metric in LOWER_IS_BETTER else -1
        key = (task.domain, task.data.name, task.label, repr(task.split))
        key += (task.head, task.metric)
        ranks[key].append(rankdata([sign * m for m in means]).tolist())
    means_of = {
        key: [statistics.fmean(column) for column in zip(*found, strict=True)]
        for key, found in ranks.items()
    }
    chosen = [[key for key in ranks if key[0] == domain] for domain in DOMAINS]
    chosen.append(list(ranks))
    return {
        system: [
            statistics.fmean(means_of[key][i] for key in some) if some else None
            for some in chosen
        ]
        for i, system in enumerate(systems)
    }


def table(tasks: Sequence[Task], results: Results, ranks: bool = True) -> str:
    """Markdown, a line a system.

    Args:
        tasks: columns.
        results: of each task, unless ``ranks`` is false.
        ranks: whether mean ranks stand behind them.
    """
    heads = [f"{t.title}, {METRIC[t.metric]}" for t in tasks]
    heads += [f"mean rank, {which}" for which in (*DOMAINS, "all") if ranks]
    lines = [f"| system | {' | '.join(heads)} |", "|---|" + "--:|" * len(heads)]
    means = mean_ranks(tasks, results) if ranks else {}
    for system, scores in results.items():
        cells = [with_error(scores.get(t.name, ())) for t in tasks]
        cells += ["-" if r is None else f"{r:.1f}" for r in means.get(system, ())]
        lines.append(f"| {system} | {' | '.join(cells)} |")
    return "\n".join(lines)


def commit() -> str:
    """Short name of this code's commit."""
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return git.stdout.strip() or "unknown"


def environment() -> str:
    """Where and when, as ESPnet's RESULTS.md say it."""
    return "\n".join(
        [
            "## Environments",
            f"- date: `{datetime.datetime.now():%Y-%m-%d %H:%M}`",
            f"- python: `{platform.python_version()}`, torch: `{version('torch')}`, "
            f"espnet: `{version('espnet')}`",
            f"- commit: `{commit()}`",
        ]
    )


def draw(tasks: Sequence[Task], results: Results, path: Path) -> None:
    """Bars of all systems, a group a task; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(1.2 + 1.6 * len(tasks), 4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(results)
    for i, (system, scores) in enumerate(results.items()):
        values = [[s.test for s in scores[t.name]] for t in tasks]
        axes.bar(
            [k + i * width for k in range(len(tasks))],
            [statistics.fmean(v) for v in values],
            width,
            yerr=[standard_error(scores[t.name]) for t in tasks],
            label=system,
        )
    labels = [
        f"{t.title}\n{METRIC[t.metric].replace(' (', chr(10) + '(')}" for t in tasks
    ]
    axes.set_xticks(
        [k + 0.4 - width / 2 for k in range(len(tasks))], labels, fontsize=7
    )
    axes.set_ylim(0, 100)
    figure.legend(fontsize=7, loc="outside upper left", ncols=len(results))
    figure.savefig(path, dpi=100)

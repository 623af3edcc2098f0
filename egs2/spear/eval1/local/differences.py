"""Differences between students of the same seeds, with their standard errors."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from heads import Score
from scipy.stats import t as student_t
from table import METRIC, Results, spread
from tasks import LOWER_IS_BETTER, Task

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Scores of a student minus those of another one, seed by seed.

    Attributes:
        values: of each seed that both have, at least one.
    """

    values: Sequence[float]

    @property
    def mean(self) -> float:
        """Mean of the differences."""
        return statistics.fmean(self.values)

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None: one pair has no spread."""
        if len(self.values) < 2:
            return None
        return statistics.stdev(self.values) / len(self.values) ** 0.5

    @property
    def reach(self) -> float:
        """Half of the interval of 95 % by Student's t; 0: one pair has none."""
        if self.error is None:
            return 0.0
        freedom = len(self.values) - 1
        return float(self.error * student_t.ppf((1 + CONFIDENCE) / 2, freedom))

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.1f}"
        return f"{round(self.mean, 1) + 0.0:+.1f}{error}"  # not -0.0

    def verdict(self, task: Task) -> str:
        """``better`` or ``worse`` if zero is outside of the interval, else ``equal``.

        For one comparison at a time; empty for one pair.
        """
        if self.error is None:
            return ""
        if abs(self.mean) <= self.reach:
            return "equal"
        return "better" if self.mean * better(task) > 0 else "worse"


def better(task: Task) -> int:
    """Sign of a difference that is an improvement."""
    return -1 if task.metric in LOWER_IS_BETTER else 1


def difference(first: Sequence[Score], other: Sequence[Score]) -> Difference | None:
    """Scores of ``other`` minus those of ``first``; None: they share no seed."""
    of_first = {score.seed: score.test for score in first}
    values = [s.test - of_first[s.seed] for s in other if s.seed in of_first]
    return Difference(values) if values else None


def differences(
    tasks: Sequence[Task], results: Results
) -> dict[str, dict[str, Difference]]:
    """Row -> task -> its difference to the first row, where they share a seed."""
    (_, first), *others = results.items()
    found: dict[str, dict[str, Difference]] = {name: {} for name, _ in others}
    for name, scores in others:
        for task in tasks:
            one = difference(first[task.name], scores[task.name])
            if one is not None:
                found[name][task.name] = one
    return found


def markdown(
    tasks: Sequence[Task], results: Results, levels: Mapping[str, Sequence[Score]]
) -> str:
    """Scores of the first row, and differences of all others to it.

    Not the scores of others: means over different seeds should not be compared.

    Args:
        tasks: columns.
        results: of all rows.
        levels: scores that are shown of the first row; behind those of fewer seeds
            stands their number.
    """
    base = next(iter(results))
    titles = [f"{t.title}, {METRIC[t.metric]}" for t in tasks]
    seeds = max(len(levels[t.name]) for t in tasks)
    cells = []
    for scores in (levels[t.name] for t in tasks):
        fewer = f" ({len(scores)})" if 0 < len(scores) < seeds else ""
        cells.append(spread(scores) + fewer)
    lines = [
        f"| | seeds | {' | '.join(titles)} |",
        "|---|--:|" + "--:|" * len(tasks),
        f"| {base} | {seeds} | {' | '.join(cells)} |",
    ]
    for name, row in differences(tasks, results).items():
        pairs = max((len(one.values) for one in row.values()), default=0)
        cells = [
            f"{row[t.name]} {row[t.name].verdict(t)}".rstrip() if t.name in row else "-"
            for t in tasks
        ]
        lines.append(f"| {name}, minus that | {pairs} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(
    tasks: Sequence[Task], rows: Mapping[str, Mapping[str, Difference]], path: Path
) -> None:
    """Differences with their intervals, up is better; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(2.4 + 1.4 * len(tasks), 4), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color="black", linewidth=0.8)
    for i, (name, row) in enumerate(rows.items()):
        shown = [(k, t, row[t.name]) for k, t in enumerate(tasks) if t.name in row]
        axes.errorbar(
            [k + 0.8 * (i + 0.5) / len(rows) for k, _, _ in shown],
            [better(t) * one.mean for _, t, one in shown],
            yerr=[one.reach for _, _, one in shown],
            fmt="o",
            capsize=3,
            label=name,
        )
    axes.set_xticks([k + 0.4 for k in range(len(tasks))], [t.title for t in tasks])
    axes.set_ylabel("points better; bars: 95 %")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=100)

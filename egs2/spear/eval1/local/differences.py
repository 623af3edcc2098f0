"""Differences between students of the same seeds, with their standard errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy.stats import t as student_t
from table import Results
from tasks import LOWER_IS_BETTER, Task

CONFIDENCE = 0.95


def contrasts(
    rows: Sequence[Mapping[int, float]],
) -> Iterator[tuple[float, float, int]]:
    """Differences of rows to the first, with seeds as blocks.

    score = row + seed + error, by least squares over all scores (a randomised block
    design: R. A. Fisher, The Design of Experiments, 1935). The variance of the errors
    is that of all rows together: that of three pairs alone would be too uncertain.

    Args:
        rows: seed -> score; each has a seed in common with the first.

    Yields:
        of each further row the difference, its standard error, degrees of freedom. If
        all have the same seeds, the difference is the mean of those of the pairs.
    """
    seeds = sorted({seed for row in rows for seed in row})
    places = [(i, seed) for i, row in enumerate(rows) for seed in row]
    others = range(1, len(rows))
    columns = [[*(i == o for o in others), *(s == t for t in seeds)] for i, s in places]
    design = np.array(columns, dtype=float)
    scores = np.array([rows[i][seed] for i, seed in places])
    solution = np.linalg.pinv(design) @ scores
    freedom = len(places) - design.shape[1]
    variance = np.square(scores - design @ solution).sum() / max(freedom, 1)
    errors = np.sqrt(variance * np.diag(np.linalg.pinv(design.T @ design)))
    for i in range(len(rows) - 1):
        yield float(solution[i]), float(errors[i]), freedom


def differences(tasks: Sequence[Task], results: Results) -> str:
    """Markdown: differences to the first row, with seeds as blocks, and what they tell.

    A difference counts if zero is outside of its interval of 95 % by Student's t, for
    one comparison at a time.
    """
    (base, first), *others = results.items()
    lines = [
        f"| minus {base} | seeds | {' | '.join(t.title for t in tasks)} |",
        "|---|--:|" + "--:|" * len(tasks),
    ]
    cells: dict[str, list[str]] = {name: [] for name, _ in others}
    for task in tasks:
        of_first = {score.seed: score.test for score in first[task.name]}
        paired = {
            name: {s.seed: s.test for s in rows[task.name] if s.seed in of_first}
            for name, rows in others
        }
        found = contrasts([of_first, *(paired[n] for n in paired if paired[n])])
        better = -1 if task.metric in LOWER_IS_BETTER else 1
        for name, scores in paired.items():
            if not cells[name]:
                cells[name].append(str(len(scores)))
            if not scores:
                cells[name].append("-")
                continue
            mean, error, freedom = next(found)
            mean = round(mean, 6) + 0.0  # not -0.0
            if not freedom:  # one pair has no spread
                cells[name].append(f"{mean:+.1f}")
                continue
            verdict = "equal"
            if abs(mean) > error * student_t.ppf((1 + CONFIDENCE) / 2, freedom):
                verdict = "better" if mean * better > 0 else "worse"
            cells[name].append(f"{mean:+.1f} ± {error:.1f} {verdict}")
    lines += [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()]
    return "\n".join(lines)

"""Scores of students as a TSV file, which several machines and nights can share."""

from __future__ import annotations

import csv
import itertools
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from heads import Score
from tasks import TaskError


class ScoreTable:
    """Scores of students: a row of a TSV file a student and task.

    Args:
        path: to read, as ``write`` made it; None: no scores yet.
        conditions: columns that must agree with this run's.
        probe: name of the present probe. Seeds may differ in it.

    Raises:
        TaskError: no such file, not such a table, scores of other conditions, or
            students of one seed that had other quantizers or probes.
    """

    COLUMNS = ("arm", "seed", "task", "dev", "test", "commit", "quantizers", "probe")

    def __init__(self, path: str, conditions: Mapping[str, str], probe: str) -> None:
        self.conditions, self.probe = conditions, probe
        self._rows: dict[tuple[str, int, str], dict[str, str]] = {}
        if not path:
            return
        try:
            with open(path, encoding="utf-8", newline="") as stream:
                rows = list(csv.DictReader(stream, delimiter="\t"))
            for row in rows:
                self._rows[row["arm"], int(row["seed"]), row["task"]] = row
                float(row["dev"]), float(row["test"])
                row["commit"], row["quantizers"].split(), row["probe"]
        except (
            OSError,
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
            csv.Error,
        ) as e:
            raise TaskError(
                f"--known {path}: {e!r}; expected a scores.tsv of evidence.sh"
            ) from e
        for key, value in conditions.items():
            if other := {row.get(key) for row in rows} - {value}:
                raise TaskError(
                    f"--known {path}: scores of students with {key} "
                    f"{sorted(map(str, other))}; this run has {value!r}"
                )
        self._see_seeds()

    def _see_seeds(self) -> None:
        """See that students of a seed share the quantizers of their codes, and a probe.

        Raises:
            TaskError: some do not.
        """
        shared: dict[int, dict[str, str]] = {}
        for (arm, seed, _), row in self._rows.items():
            if not row["quantizers"]:  # log-mel, a teacher
                continue
            facts = dict(word.split("=") for word in row["quantizers"].split())
            for name, value in {**facts, "probe": row["probe"]}.items():
                other = shared.setdefault(seed, {}).setdefault(name, value)
                if other != value:
                    raise TaskError(
                        f"'{arm}' of seed {seed} has {name} {value}, others of this "
                        f"seed {other}: they cannot be compared; remove rows of one"
                    )

    def compare(self, seeds: set[int], codes: Path) -> None:
        """See that students of these seeds would be comparable with those known.

        Quantizers differ with the number of threads, and may with the machine.

        Args:
            seeds: of which further students are to be trained.
            codes: folder of the training set's codes.

        Raises:
            TaskError: they would learn other codes, or be scored by another probe.
        """
        for (arm, seed, _), row in self._rows.items():
            if seed in seeds and row["quantizers"] and row["probe"] != self.probe:
                raise TaskError(
                    f"--known: '{arm}' of seed {seed} was scored by probe "
                    f"{row['probe']}, this code has probe {self.probe}; give other "
                    "--seeds, or leave --known out"
                )
            for name, known in (x.split("=") for x in row["quantizers"].split()):
                path = codes / f"{name}.json"
                if seed not in seeds or not path.exists():
                    continue
                facts = json.loads(path.read_text(encoding="utf-8"))
                if (here := facts["quantizer_id"]) != known:
                    raise TaskError(
                        f"--known: '{arm}' of seed {seed} learnt codes {name} of the "
                        f"quantizer {known}, which is {here} here; a comparison needs "
                        "the same codes: give other --seeds, or leave --known out"
                    )

    def seeds_of_other_probes(self) -> list[int]:
        """Seeds of students that were not scored by the present probe."""
        return sorted(
            {
                seed
                for (_, seed, _), row in self._rows.items()
                if row["quantizers"] and row["probe"] != self.probe
            }
        )

    def seeds(self, arm: str, tasks: Sequence[str]) -> list[int]:
        """Seeds of which all tasks are known."""
        seeds = sorted({seed for name, seed, _ in self._rows if name == arm})
        return [seed for seed in seeds if self.get(arm, seed, tasks)]

    def get(self, arm: str, seed: int, tasks: Sequence[str]) -> dict[str, Score] | None:
        """Task -> score of a student; None unless all tasks are known."""
        if any((arm, seed, task) not in self._rows for task in tasks):
            return None
        rows = {task: self._rows[arm, seed, task] for task in tasks}
        return {
            task: Score(seed, float(row["dev"]), float(row["test"]), [])
            for task, row in rows.items()
        }

    def others(
        self, arms: set[str], tasks: Sequence[str]
    ) -> dict[str, dict[str, list[Score]]]:
        """Name -> task -> scores of log-mel, teachers and others that are not arms."""
        found: dict[str, dict[str, list[Score]]] = {}
        for name, seed, task in sorted(self._rows):
            if name not in arms and task in tasks:
                score = self.get(name, seed, [task]) or {}
                found.setdefault(name, {})[task] = [*score.values()]
        return found

    def add(
        self, arm: str, scores: Mapping[str, Score], commit: str, quantizers: str = ""
    ) -> None:
        """Take over the scores of a student of this run.

        Args:
            arm: its name; or that of what is not trained here.
            scores: task -> score.
            commit: of the code that trained it.
            quantizers: as ``quantizers_of`` says it.
        """
        for task, s in scores.items():
            values = (arm, s.seed, task, f"{s.dev:.2f}", f"{s.test:.2f}", commit)
            values += (quantizers, self.probe)
            self._rows[arm, s.seed, task] = {
                **dict(zip(self.COLUMNS, map(str, values), strict=True)),
                **self.conditions,
            }

    def fill(self, path: Path) -> None:
        """Take over from an earlier run's table what this one did not get to."""
        if not path.exists():
            return
        present = self._rows
        try:
            earlier = ScoreTable(str(path), self.conditions, self.probe)
            self._rows = {**earlier._rows, **present}
            self._see_seeds()
        except TaskError as error:
            self._rows = present
            names = (path.with_name(f"{path.name}.old{i}") for i in itertools.count())
            aside = next(name for name in names if not name.exists())
            path.rename(aside)
            logging.warning("%s: left out, is now %s (%s)", path, aside, error)

    def present(self, tasks: Collection[str]) -> ScoreTable:
        """All but scores of these tasks by another probe than the present one."""
        found = ScoreTable("", self.conditions, self.probe)
        rows = self._rows.items()
        found._rows = {
            key: row
            for key, row in rows
            if row["probe"] == self.probe or row["task"] not in tasks
        }
        return found

    def write(self, path: Path) -> None:
        """Write all scores, those that were read too."""
        with path.open("w", encoding="utf-8", newline="") as stream:
            names = [*self.COLUMNS, *self.conditions]
            writer = csv.DictWriter(
                stream, names, "", delimiter="\t", lineterminator="\n"
            )
            writer.writeheader()
            writer.writerows(self._rows[key] for key in sorted(self._rows))

#!/usr/bin/env python3
"""Classify clips by a linear probe on cached features, and write a table.

For every seed a fifth of the clips is held out, by class and by group. On the others a
logistic regression (on standardised features) is trained; which layer it sees, and its
regularisation, is chosen by cross-validation within them. With several labels a clip
one regression a label is trained, and accuracy is not defined.

With --splits (utterance and part, as the corpus was published) nothing is drawn: if
there is a part test (or eval), it is tested, valid (or val) chooses, and the others are
for training. Otherwise the parts are folds: each is held out once, and of the others
each once to choose.
"""

import argparse
import json
import logging
import statistics
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MultiLabelBinarizer, StandardScaler

from espnet2_spear.fileio.datadir import DataDirError, read_table

REGULARISATION = (0.01, 0.1, 1.0, 10.0)  # inverse strength C
FOLDS, INNER_FOLDS = 5, 3
TEST, VALID = ("test", "eval"), ("valid", "val")  # names of parts
Rows = np.ndarray  # numbers of clips, (clips,)


@dataclass
class Task:
    """Clips with their classes.

    Attributes:
        utts: names.
        groups: (clips,) what must not be divided by a split.
        targets: (clips, classes) of 0 and 1.
        classes: names of the columns.
        parts: (clips,) names of the corpus' own parts, None: splits are drawn.
    """

    utts: list[str]
    groups: np.ndarray
    targets: np.ndarray
    classes: list[str]
    parts: np.ndarray | None = None

    @property
    def multi_label(self) -> bool:
        """Whether some clip has another number of labels than one."""
        return bool((self.targets.sum(axis=1) != 1).any())

    @classmethod
    def read(
        cls,
        labels: Path,
        groups: Path | None,
        present: Sequence[str],
        splits: Path | None = None,
    ) -> "Task":
        """Read labels (groups, parts) of the clips that there are features of.

        Raises:
            DataDirError: a clip without label, group or part, fewer than two classes,
                or parts that can be neither folds nor training and test.
        """
        label_of = read_table(labels, "utterance labels")
        group_of = read_table(groups, "utterance group") if groups else {}
        for utt in present:
            if utt not in label_of or (groups and utt not in group_of):
                raise DataDirError(f"{labels}: no label (or group) of '{utt}'; add it")
        binarizer = MultiLabelBinarizer()
        targets = binarizer.fit_transform([label_of[utt].split() for utt in present])
        if len(binarizer.classes_) < 2:
            raise DataDirError(f"{labels}: needs two classes at least")
        keys = [group_of.get(utt, utt) for utt in present]
        _, numbers = np.unique(keys, return_inverse=True)
        parts = read_parts(splits, present) if splits else None
        return cls(list(present), numbers, targets, list(binarizer.classes_), parts)


def read_parts(splits: Path, present: Sequence[str]) -> np.ndarray:
    """Read the parts of clips: (clips,) names."""
    part_of = read_table(splits, "utterance part")
    for utt in present:
        if utt not in part_of:
            raise DataDirError(f"{splits}: no part of '{utt}'; add it")
    parts = np.array([part_of[utt] for utt in present])
    names = set(parts.tolist())
    few = 3
    if names & set(TEST):
        names -= {*TEST, *VALID}
        few = 1
    if len(names) < few:
        raise DataDirError(
            f"{splits}: has the parts {', '.join(sorted(set(parts.tolist())))}; needs "
            "a part test (or eval) and one for training, or three folds at least"
        )
    return parts


@dataclass(frozen=True)
class Score:
    """What a probe reached with a seed (and a fold held out), in percent."""

    seed: int
    layer: int
    regularisation: float
    accuracy: float | None
    mean_average_precision: float
    held_out: str = ""


def splits(
    task: Task, rows: np.ndarray, folds: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (train, test) rows of a cross-validation."""
    if task.multi_label:
        order = np.random.default_rng(seed).permutation(np.unique(task.groups[rows]))
        for part in np.array_split(order, folds):
            held_out = np.isin(task.groups[rows], part)
            yield rows[~held_out], rows[held_out]
        return
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    classes = task.targets[rows].argmax(axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # classes with few clips
        for a, b in splitter.split(rows, classes, task.groups[rows]):
            yield rows[a], rows[b]


def trials(
    task: Task, seed: int
) -> Iterator[tuple[str, Rows, Rows, list[tuple[Rows, Rows]]]]:
    """Yield what is held out: its name, rows for training, for the test, to choose by.

    Args:
        task: the clips.
        seed: of splits that are drawn.
    """
    rows, parts = np.arange(len(task.utts)), task.parts
    if parts is None:
        train, test = next(splits(task, rows, FOLDS, seed))
        yield "", train, test, list(splits(task, train, INNER_FOLDS, seed))
        return
    if np.isin(parts, TEST).any():
        valid = np.isin(parts, VALID)
        train = rows[~valid & ~np.isin(parts, TEST)]
        inner = [(train, rows[valid])]
        if not valid.any():
            inner = list(splits(task, train, INNER_FOLDS, seed))
        yield "test", train, rows[np.isin(parts, TEST)], inner
        return
    for name in sorted(set(parts.tolist())):
        train = rows[parts != name]
        folds = [parts[train] == other for other in sorted(set(parts[train].tolist()))]
        inner = [(train[~fold], train[fold]) for fold in folds]
        yield name, train, rows[parts == name], inner


def fit(task: Task, features: np.ndarray, rows: np.ndarray, c: float) -> Pipeline:
    """Train a probe on some rows of (clips, channels)."""
    model = LogisticRegression(C=c, max_iter=300)
    targets = task.targets[rows]
    if task.multi_label:
        model = OneVsRestClassifier(model)
    else:
        targets = targets.argmax(axis=1)
    probe = make_pipeline(StandardScaler(), model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", UserWarning)  # a label that no clip has
        return probe.fit(features[rows], targets)


def measure(
    task: Task, features: np.ndarray, rows: np.ndarray, probe: Pipeline
) -> tuple[float | None, float]:
    """Accuracy (None with several labels) and mean average precision, in percent."""
    known = probe.predict_proba(features[rows])
    scores = np.zeros((len(rows), len(task.classes)))
    columns = np.arange(len(task.classes)) if task.multi_label else probe.classes_
    scores[:, columns] = known
    targets = task.targets[rows]
    precisions = [
        average_precision_score(targets[:, i], scores[:, i])
        for i in range(len(task.classes))
        if targets[:, i].any()
    ]
    accuracy = None
    if not task.multi_label:
        accuracy = 100 * float((scores.argmax(1) == targets.argmax(1)).mean())
    return accuracy, 100 * float(np.mean(precisions))


def run_seed(task: Task, features: np.ndarray, seed: int) -> Iterator[Score]:
    """Choose, train and test a probe; yield a score for each of :func:`trials`.

    Args:
        task: the clips.
        features: (clips, layers, channels).
        seed: of the split.
    """
    for name, train, test, inner in trials(task, seed):
        best = (-1.0, 0, REGULARISATION[0])
        for layer in range(features.shape[1]):
            view = features[:, layer]
            for c in REGULARISATION:
                values = [
                    measure(task, view, b, fit(task, view, a, c))[1] for a, b in inner
                ]
                best = max(best, (statistics.fmean(values), layer, c))
        _, layer, c = best
        view = features[:, layer]
        accuracy, precision = measure(task, view, test, fit(task, view, train, c))
        yield Score(seed, layer + 1, c, accuracy, precision, name)


def read_features(path: Path) -> tuple[list[str], np.ndarray]:
    """Read a file of features.py: names and (clips, layers, channels)."""
    with np.load(path, allow_pickle=False) as content:
        return content["utts"].tolist(), content["features"]


def spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation over the seeds, and folds."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if len(known) == 1:
        return f"{known[0]:.1f}"
    return f"{statistics.fmean(known):.1f} ± {statistics.stdev(known):.1f}"


def table(results: dict[str, list[Score]]) -> str:
    """Markdown table, a line a system; the last column compares seed by seed."""
    first, *_ = results
    lines = [
        f"| system | layer | accuracy, % | mAP, % | mAP over {first} |",
        "|---|---|--:|--:|--:|",
    ]
    base = [score.mean_average_precision for score in results[first]]
    for name, scores in results.items():
        layers = ", ".join(map(str, sorted({score.layer for score in scores})))
        precisions = [score.mean_average_precision for score in scores]
        more = [b - a for a, b in zip(base, precisions, strict=True)]
        cells = [
            name,
            layers,
            spread([score.accuracy for score in scores]),
            spread(precisions),
            "" if name == first else spread(more),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--features",
        required=True,
        nargs="+",
        metavar="NAME=NPZ",
        help="of features.py; {seed} in the path stands for the seed",
    )
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--groups", type=Path)
    parser.add_argument("--splits", type=Path, help="parts of the corpus")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--output", type=Path, required=True, help="Markdown (and .json)"
    )
    return parser


def main(cmd: list[str] | None = None) -> None:
    """Write the table."""
    from espnet2_spear.bin.asr_score import environments

    args = get_parser().parse_args(cmd)
    results: dict[str, list[Score]] = {}
    task = None
    for entry in args.features:
        name, _, pattern = entry.partition("=")
        for seed in args.seeds:
            utts, features = read_features(Path(pattern.format(seed=seed)))
            if task is None:
                task = Task.read(args.labels, args.groups, utts, args.splits)
            if utts != task.utts:
                raise DataDirError(f"{pattern}: is of other clips; make it again")
            for score in run_seed(task, features, seed):
                results.setdefault(name, []).append(score)
                logging.info("%s: %s", name, score)
    counts = task.targets.sum(axis=0)
    shown = ", ".join(f"{c} {n}" for c, n in zip(task.classes, counts, strict=True))
    majority = ""
    if not task.multi_label:
        majority = f"; majority {100 * counts.max() / counts.sum():.1f} %"
    title = f"## Linear probe, seeds {', '.join(map(str, args.seeds))}"
    if task.parts is not None:
        known = ", ".join(f"{k} {n}" for k, n in sorted(Counter(task.parts).items()))
        title += f"; the corpus' own parts: {known}"
    parts = [
        "# RESULTS",
        environments(),
        title,
        table(results),
        f"{len(task.utts)} clips{majority}: {shown}\n",
    ]
    text = "\n\n".join(parts)
    args.output.write_text(text, encoding="utf-8")
    content = {name: [asdict(score) for score in s] for name, s in results.items()}
    args.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="(probe.py) %(message)s")
    main()

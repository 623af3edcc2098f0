#!/usr/bin/env python3
"""Accuracy and mAP of classified clips, as RESULTS.md in ESPnet's form and as JSON."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from asr_score import ScoreError, environments

from espnet2_spear.fileio.atomic import write_json
from espnet2_spear.fileio.datadir import read_table
from espnet2_spear.fileio.explain import command

_HEADER = "|dataset|Clips|Classes|Acc|mAP|\n" + "|---" * 5 + "|"


def read_scores(
    labels: Path, scores: Path, token_list: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Read what is right and what a model says.

    Args:
        labels: utterance and its labels.
        scores: utterance and the score of each class, as ``cls_inference
            --output_all_probabilities true`` writes them.
        token_list: the classes, and ``<unk>``, which has no score.

    Returns:
        targets: bool (clips, classes).
        values: float64 (clips, classes).

    Raises:
        ScoreError: names the file, an utterance and the remedy.
    """
    classes = token_list.read_text(encoding="utf-8").split()[:-1]
    place = {name: i for i, name in enumerate(classes)}
    wanted = read_table(labels, "utterance labels")
    found = read_table(scores, "utterance scores")
    if wanted.keys() != found.keys():
        utt = min(wanted.keys() ^ found.keys())
        raise ScoreError(
            f"{scores}: is of other utterances than {labels}, e.g. '{utt}'; classify "
            "the set again"
        )
    targets = np.zeros((len(wanted), len(classes)), bool)
    values = np.zeros(targets.shape)
    for row, utt in enumerate(sorted(wanted)):
        for name in wanted[utt].split():
            if name not in place:
                raise ScoreError(
                    f"{labels}: '{utt}' has the label '{name}', which is not in "
                    f"{token_list}; it is the list of another training"
                )
            targets[row, place[name]] = True
        line = np.array(found[utt].split(), float)
        if line.shape != (len(classes),):
            raise ScoreError(
                f"{scores}: '{utt}' has {line.size} scores for {len(classes)} classes; "
                "classify with --output_all_probabilities true (clips that are too "
                "short for the model have one: leave them out)"
            )
        values[row] = line
    return targets, values


def measure(targets: np.ndarray, values: np.ndarray) -> dict[str, float | None]:
    """Accuracy and mean average precision in percent.

    Args:
        targets: bool (clips, classes).
        values: float (clips, classes).

    Returns:
        ``accuracy`` of the highest score, None where a clip has other than one label;
        ``mAP`` over the classes that have a clip, and their number ``classes``.
    """
    from sklearn.metrics import average_precision_score

    accuracy = None
    if (targets.sum(axis=1) == 1).all():
        right = values.argmax(axis=1) == targets.argmax(axis=1)
        accuracy = 100 * float(right.mean())
    present = np.flatnonzero(targets.any(axis=0))
    precisions = [average_precision_score(targets[:, i], values[:, i]) for i in present]
    return {
        "clips": len(targets),
        "classes": len(present),
        "accuracy": accuracy,
        "mAP": 100 * float(np.mean(precisions)),
    }


def write_results(exp_dir: Path, sets: dict[str, dict[str, Any]]) -> None:
    """Write ``RESULTS.md`` and ``score.json`` of some sets into a folder."""
    rows = []
    for name, found in sets.items():
        accuracy = "" if found["accuracy"] is None else f"{found['accuracy']:.1f}"
        cells = [
            name,
            found["clips"],
            found["classes"],
            accuracy,
            f"{found['mAP']:.1f}",
        ]
        rows.append("|" + "|".join(map(str, cells)) + "|")
    table = "\n".join([_HEADER, *rows])
    text = "\n\n".join(["# RESULTS", environments(), f"## {exp_dir.name}", table])
    (exp_dir / "RESULTS.md").write_text(text + "\n", encoding="utf-8")
    write_json(exp_dir / "score.json", {"sets": sets})


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        description="Score classified clips; writes RESULTS.md and score.json"
    )
    parser.add_argument("--exp_dir", type=Path, required=True, help="of the classifier")
    parser.add_argument("--token_list", type=Path, required=True)
    parser.add_argument(
        "--score_set",
        nargs=3,
        action="append",
        required=True,
        metavar=("NAME", "LABELS", "SCORES"),
        help="name in the table, labels, scores of all classes; may be repeated",
    )
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Score; see ``--help``."""
    sets = {
        name: measure(*read_scores(Path(labels), Path(scores), args.token_list))
        for name, labels, scores in args.score_set
    }
    write_results(args.exp_dir, sets)
    for name, found in sets.items():
        print(f"{args.exp_dir.name} {name}: {found}")


if __name__ == "__main__":
    main()

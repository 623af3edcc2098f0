#!/usr/bin/env python3
"""WER and CER of decoded text, as RESULTS.md in ESPnet's form and as JSON."""

from __future__ import annotations

import argparse
import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any

from espnet2_spear.errors import UserError
from espnet2_spear.fileio.atomic import write_json
from espnet2_spear.fileio.datadir import read_table
from espnet2_spear.fileio.explain import command

_HEADER = "|dataset|Snt|Wrd|Corr|Sub|Del|Ins|Err|S.Err|\n" + "|---" * 9 + "|"


class ScoreError(UserError):
    """References and hypotheses do not belong together."""


def read_pairs(ref: Path, hyp: Path) -> tuple[list[str], list[str]]:
    """Read Kaldi ``text`` files of the same utterances.

    Words are separated by single spaces in what is returned. An empty hypothesis is
    legal (all words deleted), an empty reference is not.

    Raises:
        ScoreError: names the file, an utterance and the remedy.
    """
    refs = read_table(ref, "utterance transcript", empty_values=True)
    hyps = read_table(hyp, "utterance transcript", empty_values=True)
    if not refs:
        raise ScoreError(f"{ref}: no utterances; prepare the data again")
    for name, missing in (
        (hyp, sorted(set(refs) - set(hyps))),
        (ref, sorted(set(hyps) - set(refs))),
    ):
        if missing:
            raise ScoreError(
                f"{name}: lacks {len(missing)} utterances, for example "
                f"'{missing[0]}'; decode the same set again"
            )
    order = sorted(refs)
    empty = [utt for utt in order if not refs[utt].strip()]
    if empty:
        raise ScoreError(
            f"{ref}: utterance '{empty[0]}' has an empty transcript; remove it from "
            "the set"
        )
    clean = [[" ".join(table[utt].split()) for utt in order] for table in (refs, hyps)]
    return clean[0], clean[1]


def count_errors(refs: list[str], hyps: list[str], unit: str) -> dict[str, int]:
    """Count the errors of a set with jiwer.

    Args:
        refs: references, single spaces between words.
        hyps: hypotheses, in the same order.
        unit: ``wer`` (words) or ``cer`` (characters, the space is one of them).

    Returns:
        counts: sentences, units (of the references), correct, substitutions,
        deletions, insertions, wrong_sentences.
    """
    import jiwer

    process = jiwer.process_words if unit == "wer" else jiwer.process_characters
    out = process(refs, hyps)
    return {
        "sentences": len(refs),
        "units": out.hits + out.substitutions + out.deletions,
        "correct": out.hits,
        "substitutions": out.substitutions,
        "deletions": out.deletions,
        "insertions": out.insertions,
        "wrong_sentences": sum(r != h for r, h in zip(refs, hyps, strict=True)),
    }


def error_rate(counts: dict[str, int]) -> float:
    """Substitutions, deletions and insertions in percent of the reference units."""
    errors = counts["substitutions"] + counts["deletions"] + counts["insertions"]
    return 100.0 * errors / counts["units"]


def table_row(name: str, counts: dict[str, int]) -> str:
    """One line of ESPnet's table; rates in percent."""
    rates = [
        100.0 * counts[key] / counts["units"]
        for key in ("correct", "substitutions", "deletions", "insertions")
    ]
    rates.append(error_rate(counts))
    rates.append(100.0 * counts["wrong_sentences"] / counts["sentences"])
    cells = [name, str(counts["sentences"]), str(counts["units"])]
    return "|" + "|".join(cells + [f"{rate:.1f}" for rate in rates]) + "|"


def environments() -> str:
    """The block that stands at the top of ESPnet's results."""
    import espnet2
    import torch

    def git(*args: str) -> str:
        try:
            done = subprocess.run(
                ["git", *args], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return "not a git checkout"
        return done.stdout.strip()

    lines = [
        "## Environments",
        f"- date: `{datetime.datetime.now().astimezone():%a %b %d %H:%M:%S %Z %Y}`",
        f"- python version: `{platform.python_version()}`",
        f"- espnet version: `espnet {espnet2.__version__}`",
        f"- pytorch version: `pytorch {torch.__version__}`",
        f"- Git hash: `{git('rev-parse', 'HEAD')}`",
        f"  - Commit date: `{git('log', '-1', '--format=%cd')}`",
    ]
    return "\n".join(lines)


def train_minutes(checkpoint: Path) -> float:
    """Minutes of training and validation, from ESPnet's ``checkpoint.pth``.

    Summed over epochs, so that a run that was interrupted counts in full.
    """
    import numpy as np
    import torch

    # ESPnet 202511 keeps the times as timedelta, and numpy numbers beside them.
    scalar = getattr(np, "_core", None) or np.core
    allowed = [datetime.timedelta, scalar.multiarray.scalar, np.dtype, np.float64]
    allowed.append(type(np.dtype("float64")))
    with torch.serialization.safe_globals(allowed):
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    seconds = 0.0
    for epoch in state["reporter"]["stats"].values():
        for mode in epoch.values():
            spent = mode["time"]
            if isinstance(spent, dict):
                spent = spent["__timedelta_seconds__"]
            elif isinstance(spent, datetime.timedelta):
                spent = spent.total_seconds()
            seconds += float(spent)
    return seconds / 60


def write_results(
    exp_dir: Path, sets: list[tuple[str, Path, Path]], info: dict[str, Any]
) -> dict[str, Any]:
    """Score sets and write ``RESULTS.md`` and ``score.json`` into a folder.

    Args:
        exp_dir: folder of the recognizer.
        sets: (name in the table, reference text, decoded text).
        info: further entries of ``score.json``.

    Returns:
        what ``score.json`` holds; rates in percent.
    """
    score: dict[str, Any] = dict(info, sets={})
    tables: dict[str, list[str]] = {"wer": [], "cer": []}
    for name, ref, hyp in sets:
        refs, hyps = read_pairs(ref, hyp)
        score["sets"][name] = {}
        for unit, rows in tables.items():
            counts = count_errors(refs, hyps, unit)
            rows.append(table_row(name, counts))
            score["sets"][name][unit] = {**counts, "rate": error_rate(counts)}
    parts = ["# RESULTS", environments(), f"## {exp_dir.name}"]
    for unit, rows in tables.items():
        parts.append(f"### {unit.upper()}\n\n" + "\n".join([_HEADER, *rows]))
    text = "\n\n".join(parts) + "\n"
    (exp_dir / "RESULTS.md").write_text(text, encoding="utf-8")
    write_json(exp_dir / "score.json", score)
    return score


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        description="Score decoded text; writes RESULTS.md and score.json",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--exp_dir", type=Path, required=True, help="Recognizer")
    parser.add_argument(
        "--score_set",
        nargs=3,
        action="append",
        required=True,
        metavar=("NAME", "REF", "HYP"),
        help="Name in the table, reference text, decoded text; may be repeated",
    )
    parser.add_argument("--system", default="", help="Name for asr_table")
    parser.add_argument("--seed", type=int, default=0, help="Seed for asr_table")
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Score; see ``--help``."""
    info: dict[str, Any] = {"system": args.system, "seed": args.seed}
    checkpoint = args.exp_dir / "checkpoint.pth"
    if checkpoint.exists():
        info["train_minutes"] = train_minutes(checkpoint)
    sets = [(name, Path(ref), Path(hyp)) for name, ref, hyp in args.score_set]
    score = write_results(args.exp_dir, sets, info)
    for name, rates in score["sets"].items():
        wer, cer = rates["wer"]["rate"], rates["cer"]["rate"]
        print(f"{args.exp_dir.name} {name}: WER {wer:.1f} % CER {cer:.1f} %")


if __name__ == "__main__":
    main()

"""Which teacher's codes are predicted on which domain, and with what weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

LossWeights = str | Mapping[str, Any]

PRESETS = ("joint", "disjoint", "asymmetric")
DEFAULT_PRESET = "asymmetric"  # of the published models
MAIN_WEIGHT, OTHER_WEIGHT = 1.0, 0.1  # lambda of the published models


def preset_table(
    preset: str,
    domains: Sequence[str],
    teachers: Sequence[str],
    main: str | None = None,
    weights: Mapping[str, float] | None = None,
) -> dict[str, dict[str, float]]:
    """Write out one of the three tables that the paper compares.

    A teacher's own domain is the one of its name.

    Args:
        preset: ``joint``: every teacher on every domain; ``disjoint``: every teacher
            on its own domain only; ``asymmetric``: the main teacher on every domain,
            the others on their own.
        domains: names of the domains.
        teachers: names of the teachers.
        main: the main teacher; by default the first.
        weights: teacher -> weight wherever it is used; by default 1 for the main one
            and 0.1 for the others.

    Returns:
        domain -> teacher -> weight.

    Raises:
        ValueError: an unknown preset or teacher, a teacher without a domain of its
            name where one is needed, or a domain that no teacher would serve.
    """
    if preset not in PRESETS:
        raise ValueError(f"loss_weights '{preset}': one of {', '.join(PRESETS)}")
    main = teachers[0] if main is None else main
    weights = dict(weights or {})
    for name in {main, *weights} - set(teachers):
        raise ValueError(f"loss_weights: unknown teacher '{name}' of {list(teachers)}")
    for name in teachers:
        alone = preset == "disjoint" or (preset == "asymmetric" and name != main)
        if alone and name not in domains:
            raise ValueError(
                f"loss_weights '{preset}': teacher '{name}' needs a domain of its "
                f"name, the domains are {list(domains)}; rename it or write a table"
            )
    table = {}
    for domain in domains:
        table[domain] = {
            name: float(
                weights.get(name, MAIN_WEIGHT if name == main else OTHER_WEIGHT)
            )
            for name in teachers
            if preset == "joint"
            or name == domain
            or (preset == "asymmetric" and name == main)
        }
        if not table[domain]:
            raise ValueError(
                f"loss_weights '{preset}': no teacher for domain '{domain}'"
            )
    return table


def resolve_loss_weights(
    loss_weights: LossWeights, domains: Sequence[str], teachers: Sequence[str]
) -> Mapping[str, Mapping[str, float]]:
    """Turn the option into a table, domain -> teacher -> weight.

    Args:
        loss_weights: the name of a preset; or ``{preset: NAME, main: TEACHER,
            weights: {TEACHER: WEIGHT}}``, see :func:`preset_table`; or a table.
        domains: names of the domains.
        teachers: names of the teachers.

    Raises:
        ValueError: see :func:`preset_table`; or no such option.
    """
    if isinstance(loss_weights, str):
        loss_weights = {"preset": loss_weights}
    if not isinstance(loss_weights, Mapping):
        raise ValueError(
            f"loss_weights {loss_weights!r}: expected domain -> teacher -> weight, or "
            f"one of {', '.join(PRESETS)}"
        )
    if not isinstance(loss_weights.get("preset"), str):
        return _checked_table(loss_weights)
    if unknown := [k for k in loss_weights if k not in ("preset", "main", "weights")]:
        raise ValueError(
            f"loss_weights: {unknown} beside preset, which takes main and weights; "
            "options of a command line are added to the table of a YAML file: name "
            "the preset there"
        )
    weights = loss_weights.get("weights") or {}
    loss_weights = {**loss_weights, "weights": _checked_row("weights", weights)}
    return preset_table(domains=domains, teachers=teachers, **loss_weights)


def _checked_table(table: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {domain: _checked_row(domain, row) for domain, row in table.items()}


def _checked_row(name: str, row: Any) -> dict[str, float]:
    if not isinstance(row, Mapping):
        raise ValueError(f"loss_weights.{name} {row!r}: expected teacher -> weight")
    for teacher, weight in row.items():
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not (number and math.isfinite(weight) and weight >= 0):
            raise ValueError(
                f"loss_weights.{name}.{teacher} {weight!r}: expected a number, 0 or "
                "more"
            )
    return dict(row)

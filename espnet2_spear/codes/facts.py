"""Check, before a training starts, that the codes on disk belong to it."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from espnet2_spear.codes.targets import TeacherCodes
from espnet2_spear.errors import UserError

PREFIX = "codes_"
SHAPE = ("num_codebooks", "codebook_size", "frame_rate")


def codes_facts(path: str | Path) -> dict[str, Any] | None:
    """Facts that tokenization wrote beside its codes; None for codes from elsewhere.

    Args:
        path: ``NAME.scp``, which has ``NAME.json`` beside it.
    """
    file = Path(path).with_suffix(".json")
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError as error:
        raise UserError(
            f"{file}: malformed ({error}); tokenize again (stage 5)"
        ) from error
    return facts if isinstance(facts, dict) else None


def codes_shape(path: str | Path) -> TeacherCodes:
    """Shape of codes, by the facts beside them.

    Args:
        path: as for :func:`codes_facts`.

    Raises:
        UserError: no facts, or none of the number of codebooks.
    """
    try:
        facts = codes_facts(path) or {}
        return TeacherCodes(**{key: facts[key] for key in SHAPE if key in facts})
    except TypeError as error:
        raise UserError(
            f"{Path(path).with_suffix('.json')}: missing or malformed ({error}); it is "
            f"written beside the codes: tokenize (stage 5)"
        ) from None


def check_codes_facts(args: argparse.Namespace) -> None:
    """Compare all codes of a training with its teachers and with each other.

    Codes of every teacher are needed in training and validation, and no others.

    The identity of each teacher's quantizer becomes a part of the configuration
    (``teachers.<name>.quantizer``), and so of config.yaml and of packed models. So does
    the shape of its codes where the configuration leaves it out, such as a
    ``codebook_size`` of 2000: the heads are made for it.

    Args:
        args: of the training; ``teachers`` is completed in place.

    Raises:
        UserError: codes of a teacher that are missing or that no teacher has,
            training and validation codes of different quantizers, a shape that is not
            the configuration's, or another quantizer than the experiment began with.
    """
    codes = []
    for part in ("train", "valid"):
        option = f"{part}_data_path_and_name_and_type"
        entries = getattr(args, option) or ()
        found = [
            (path, name.removeprefix(PREFIX))
            for path, name, _ in entries
            if name.startswith(PREFIX)
        ]
        names = {teacher for _, teacher in found}
        if entries and names != set(args.teachers):
            raise UserError(
                f"--{option}: has codes of {sorted(names)}, --teachers are "
                f"{sorted(args.teachers)}; give FILE,{PREFIX}TEACHER,TYPE for each of "
                "these and for no other"
            )
        codes += found
    begun = _teachers_of_experiment(args)
    for path, teacher in codes:
        facts = codes_facts(path)
        if facts is None:
            # logging.info() would set the root logger up before ESPnet does.
            logging.getLogger(__name__).info(f"{path}: no facts beside these codes")
            continue
        conf = args.teachers[teacher]
        _check_shape(path, teacher, conf, facts)
        identity = facts.get("quantizer_id")
        if identity is None:
            continue
        for origin, expected in (
            ("the configuration or other codes", conf.get("quantizer")),
            ("the experiment so far", begun.get(teacher, {}).get("quantizer")),
        ):
            if expected not in (None, identity):
                raise UserError(
                    f"{path}: codes of quantizer {identity}, but {origin} of teacher "
                    f"'{teacher}' used {expected}; tokenize all data with one "
                    "quantizer (stage 5), or train into another --output_dir"
                )
        conf["quantizer"] = identity


def _check_shape(
    path: str, teacher: str, conf: dict[str, Any], facts: Mapping[str, Any]
) -> None:
    for key in SHAPE:
        if key not in facts:
            continue
        configured = conf.setdefault(key, facts[key])
        if facts[key] != configured:
            raise UserError(
                f"{path}: codes with {key} {facts[key]}, but the configuration "
                f"has teachers.{teacher}.{key} {configured}; correct the configuration "
                f"(or give --teachers {teacher}.{key}={facts[key]}), or tokenize again"
            )


def _teachers_of_experiment(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Teachers of the configuration that an experiment to be resumed began with."""
    path = Path(args.output_dir) / "config.yaml"
    if not args.resume or not path.exists():
        return {}
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return (content or {}).get("teachers") or {}

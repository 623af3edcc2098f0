#!/usr/bin/env python3
"""Pack a pre-trained student for the model zoo: ``task_pack --task student``."""

from __future__ import annotations

import argparse

from espnet2_spear.bin import task_pack
from espnet2_spear.fileio.explain import main_with_one_line_errors


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of task_pack."""
    parser = task_pack.get_parser()
    parser.set_defaults(task=task_pack.STUDENT)
    return parser


def main(cmd: list[str] | None = None) -> None:
    """Pack; see ``--help``.

    Raises:
        PackError: a file is missing.
        CheckpointError: weights and configuration that do not belong together.
    """
    main_with_one_line_errors(get_parser(), task_pack.run, cmd)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Pack a pre-trained student for the model zoo: ``task_pack --task student``."""

from __future__ import annotations

import argparse

from espnet2_spear.bin import task_pack
from espnet2_spear.fileio.explain import command


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of task_pack."""
    parser = task_pack.get_parser()
    parser.set_defaults(task=task_pack.STUDENT)
    return parser


main = command(get_parser)(task_pack.run)

if __name__ == "__main__":
    main()

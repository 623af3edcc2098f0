#!/usr/bin/env python3
"""Train by ESPnet3: ``python run.py student=... [key=value ...]``."""

import sys
from pathlib import Path

from espnet3.systems.base.training import train
from omegaconf import OmegaConf


def main(cmd: list[str] | None = None) -> None:
    """Read conf/training.yaml, change it as the command line says, and train."""
    here = Path(__file__).resolve().parent
    config = OmegaConf.load(here / "conf" / "training.yaml")
    changes = OmegaConf.from_dotlist(sys.argv[1:] if cmd is None else cmd)
    config = OmegaConf.merge(config, {"recipe_dir": str(here)}, changes)
    if OmegaConf.is_missing(config, "student"):
        sys.exit("run.py: say student=FOLDER_OR_FILE (a pre-trained student)")
    OmegaConf.resolve(config)  # ESPnet3 takes parts of it out of their context
    train(config)


if __name__ == "__main__":
    main()

"""``spear-python``: python, with the classes of this package known to ESPnet.

For every place where ESPnet's recipes let you choose the Python, such as
``asr.sh --python spear-python``. Takes what python takes, since it is this Python,
started with a ``sitecustomize`` that imports the plugin (options that switch that off,
``-I``, ``-E`` and ``-S``, switch the plugin off, too). ``python -m
espnet2_spear.launcher`` is the same.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> None:
    """Entry point of the console script: becomes python."""
    start = str(Path(__file__).with_name("start"))
    paths = [start, *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], env)


if __name__ == "__main__":
    main()

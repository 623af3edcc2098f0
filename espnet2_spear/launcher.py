"""``spear-python``: python, with the classes of this package known to ESPnet.

For wherever ESPnet's recipes let you choose the Python: ``asr.sh --python
spear-python``. ``python -m espnet2_spear.launcher`` is the same. It becomes this
Python, which imports the plugin by a ``sitecustomize``; so options that switch that
off, ``-I``, ``-E`` and ``-S``, switch the plugin off, too.
"""

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

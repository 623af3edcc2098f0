"""Runs at the start of a Python that ``spear-python`` starts: import the plugin.

Takes itself out of the paths first, so that everything behind it is as without it, and
runs the ``sitecustomize`` that it hides, if there is one.
"""

import os
import sys


def _run() -> None:
    folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p) != folder]
    mine, _, theirs = os.environ.get("PYTHONPATH", "").partition(os.pathsep)
    if os.path.abspath(mine) == folder:
        os.environ["PYTHONPATH"] = theirs
        if not theirs:
            del os.environ["PYTHONPATH"]
    own = sys.modules.pop(__name__)
    try:
        import sitecustomize  # noqa: F401
    except ImportError:
        pass
    finally:
        sys.modules.setdefault(__name__, own)
    root = os.path.dirname(os.path.dirname(folder))
    before = list(sys.path)
    sys.path.append(root)  # where it is not installed
    try:
        import espnet2_spear  # noqa: F401
    finally:
        sys.path[:] = before


if __name__ == "sitecustomize":
    _run()

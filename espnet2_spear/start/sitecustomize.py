"""Runs at the start of a Python that ``spear-python`` starts: import the plugin.

Takes itself out of the paths first, so that everything behind it is as without it, and
runs the ``sitecustomize`` that it hides, if there is one.
"""

import os
import sys

if __name__ == "sitecustomize":
    own = sys.modules.pop(__name__)
    folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != folder]
    # The launcher's is the first, unless something in between put its own before it.
    first, _, paths = os.environ.get("PYTHONPATH", "").partition(os.pathsep)
    if os.path.abspath(first) == folder:
        os.environ.pop("PYTHONPATH", None)
        if paths:
            os.environ["PYTHONPATH"] = paths
    try:
        import sitecustomize  # noqa: F401
    except ImportError:
        pass
    finally:
        sys.modules.setdefault(__name__, own)
    before = list(sys.path)
    sys.path.append(os.path.dirname(os.path.dirname(folder)))  # where not installed
    try:
        import espnet2_spear  # noqa: F401
    finally:
        sys.path[:] = before

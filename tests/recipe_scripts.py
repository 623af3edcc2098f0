"""The recipes' scripts, run as a user runs them."""

import os
import subprocess
from pathlib import Path

from conftest import ROOT

RECIPES = ROOT / "egs2/spear"


def run_script(
    script: str, *options: str | Path, cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end.

    Args:
        script: below the folder of the recipes.
        options: of it.
        cwd: where it is started.
        env: added to the environment, in which a process has one thread.
    """
    command = ["bash", RECIPES / script, *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def folders(path: Path) -> list[str]:
    """Options that keep all outputs below a folder."""
    return [f"--{name}dir={path / name}" for name in ("data", "dump", "exp")]

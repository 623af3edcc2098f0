"""Importing the plugin must not harm the processes that a program spawns."""

import subprocess
import sys
from pathlib import Path

import espnet2_spear

SCRIPT = """
import multiprocessing
import sys

def child(queue):
    queue.put("espnet2_spear" in sys.modules)

if __name__ == "__main__":
    import espnet2_spear

    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    process.join()
    print(process.exitcode, queue.get() if process.exitcode == 0 else None)
"""


def test_plugin_beside_the_script_only(tmp_path: Path) -> None:
    """Not installed: children start with another sys.path than that of the script."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "script.py").write_text(SCRIPT, encoding="utf-8")
    package = Path(espnet2_spear.__file__).parent
    (project / "espnet2_spear").symlink_to(package, target_is_directory=True)
    # The Python under the virtual environment, which does not have the plugin.
    python = getattr(sys, "_base_executable", sys.executable)
    done = subprocess.run(
        [python, "-E", str(project / "script.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "0 True\n", done.stderr

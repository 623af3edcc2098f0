"""spear-python takes what python takes, and registers in the processes it spawns."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT
from spawn_script import SPAWN

LAUNCHER = [sys.executable, "-m", "espnet2_spear.launcher"]
SHOW = """
import sys
main = sys.modules["__main__"]
print(sys.argv, sys.path[0], __name__, main.__dict__ is globals())
print(sys.flags.dev_mode, sys.flags.optimize, sys.warnoptions)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Scripts and a package to run."""
    (tmp_path / "show.py").write_text(SHOW, encoding="utf-8")
    (tmp_path / "spawn.py").write_text(SPAWN, encoding="utf-8")
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(SHOW, encoding="utf-8")
    (package / "show.py").write_text(SHOW, encoding="utf-8")
    return tmp_path


def run(
    command: list[str], folder: Path, text: str = ""
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}
    env.pop("SPEAR_ESPNET_DISABLE", None)
    return subprocess.run(
        command, cwd=folder, env=env, input=text, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "args",
    [
        ["show.py", "a", "-m", "--b"],
        ["package/show.py", "a"],
        ["FOLDER/package", "a"],
        ["-m", "show", "a", "-c", "b"],
        ["-m", "package.show"],
        ["-mpackage", "-u"],
        ["-c", SHOW, "a", "-m"],
        ["-", "a", "b"],
        [],
        ["-u", "show.py", "a"],
        ["-um", "package.show", "a"],
        ["-X", "dev", "-Wignore", "-O", "show.py", "-X"],
        ["-W", "error::UserWarning", "-c", SHOW],
        ["--version"],
        ["no_such_script.py"],
        ["-c"],
        ["-m", "no_such_module"],
        ["-c", "import sys; sys.exit(3)"],
    ],
    ids=lambda args: " ".join(args).replace(SHOW, "CODE") or "stdin",
)
def test_same_as_python(folder: Path, args: list[str]) -> None:
    args = [arg.replace("FOLDER", str(folder)) for arg in args]
    expected, found = (
        run([*python, *args], folder, text=SHOW)
        for python in ([sys.executable], LAUNCHER)
    )
    assert (found.returncode, found.stdout) == (expected.returncode, expected.stdout)
    assert found.stderr.splitlines()[-1:] == expected.stderr.splitlines()[-1:]


@pytest.mark.parametrize("option", [[], ["-u"]])
def test_registers(folder: Path, option: list[str]) -> None:
    code = "import sys; print('espnet2_spear' in sys.modules)"
    assert run([*LAUNCHER, *option, "-c", code], folder).stdout == "True\n"


def test_paths_are_as_without_it(folder: Path) -> None:
    """Its own folder is gone, and a sitecustomize of the user's has run."""
    (folder / "sitecustomize.py").write_text("import os; os.environ['HERS'] = '1'")
    show = (
        "import os, sys; print(sys.path, os.environ['HERS'], os.environ['PYTHONPATH'])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    runs = [
        subprocess.run([*start, "-c", show], env=env, capture_output=True, text=True)
        for start in ([sys.executable], LAUNCHER)
    ]
    assert runs[0].stdout and runs[1].stdout == runs[0].stdout, runs[1].stderr


def test_a_path_that_came_before_the_launchers_stays(folder: Path) -> None:
    start = ROOT / "espnet2_spear" / "start"
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{start}"}
    show = [sys.executable, "-c", "import os; print(os.environ['PYTHONPATH'])"]
    found = subprocess.run(show, env=env, capture_output=True, text=True)
    assert found.stdout.startswith(str(folder)), found.stderr


@pytest.mark.second_env
@pytest.mark.parametrize(
    "args",
    [
        ["spawn.py", "spawn"],
        ["spawn.py", "forkserver"],
        ["-m", "spawn", "forkserver"],
        ["-m", "spawn", "spawn", "espnet"],
    ],
    ids=" ".join,
)
def test_children_register(folder: Path, args: list[str]) -> None:
    """The console script; the scripts themselves know nothing of the plugin."""
    console = Path(sysconfig.get_path("scripts")) / "spear-python"
    done = run([str(console), *args], folder)
    # The last line: ESPnet 202511 prints what it lacks before.
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1:] == ["True"], done.stderr

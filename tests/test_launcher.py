"""spear-python takes what python takes, and registers in the processes it spawns."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT

LAUNCHER = [sys.executable, "-m", "espnet2_spear.launcher"]
SHOW = """
import sys
main = sys.modules["__main__"]
print(sys.argv, sys.path[0], __name__, main.__dict__ is globals())
print(sys.flags.dev_mode, sys.flags.optimize, sys.warnoptions)
"""
SPAWN = """
import multiprocessing
import sys

def child(connection):
    # Importing ESPnet takes long: only where this is asked for.
    if "espnet" in sys.argv:
        from espnet2.tasks.abs_task import optim_classes, scheduler_classes
        connection.send("scaledadam" in optim_classes and "eden" in scheduler_classes)
    else:
        connection.send("espnet2_spear" in sys.modules)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    parent, other = context.Pipe()
    process = context.Process(target=child, args=(other,))
    process.start()
    print(parent.recv())
    process.join()
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
    ],
    ids=lambda args: " ".join(args).replace(SHOW, "CODE") or "stdin",
)
def test_same_as_python(folder: Path, args: list[str]) -> None:
    args = [arg.replace("FOLDER", str(folder)) for arg in args]
    expected = run([sys.executable, *args], folder, text=SHOW)
    assert expected.returncode == 0 and expected.stdout
    assert run([*LAUNCHER, *args], folder, text=SHOW).stdout == expected.stdout


def test_registers_and_passes_the_exit_code(folder: Path) -> None:
    code = "import sys; sys.exit(3 if 'espnet2_spear' in sys.modules else 4)"
    assert run([*LAUNCHER, "-c", code], folder).returncode == 3
    assert run([*LAUNCHER, "-u", "-c", code], folder).returncode == 3


def test_version_is_pythons(folder: Path) -> None:
    assert run([*LAUNCHER, "--version"], folder).stdout.startswith("Python 3.")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no_such_script.py"], "can't open file"),
        (["-c"], "Argument expected for the -c option"),
        (["-m", "no_such_module"], "No module named no_such_module"),
    ],
)
def test_wrong_command_line(folder: Path, args: list[str], message: str) -> None:
    done = run([*LAUNCHER, *args], folder)
    assert done.returncode != 0
    assert message in done.stderr


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
    assert done.stdout.splitlines()[-1:] == ["True"], done.stderr

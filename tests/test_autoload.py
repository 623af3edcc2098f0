"""The opt-in start-up file: written, effective in children, harmless when orphaned.

All of it happens in a throw-away virtual environment.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from spawn_script import SPAWN

import espnet2_spear
from espnet2_spear import autoload, doctor
from espnet2_spear.errors import UserError

ROOT = Path(espnet2_spear.__file__).resolve().parent.parent
# What setuptools' own start-up file does; ESPnet imports distutils.
SHIM = "import os; __import__('_distutils_hack').add_shim()"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A virtual environment in which the plugin is installed, as by pip install -e."""
    folder = tmp_path_factory.mktemp("venv") / "env"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True
    )
    python = str(folder / "bin" / "python")
    site = Path(
        run([python, "-c", "import sysconfig as s; print(s.get_path('purelib'))"])
    )
    (site / "installed.pth").write_text(str(ROOT), encoding="utf-8")
    return python


def start(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    clean.pop("SPEAR_ESPNET_DISABLE", None)
    env = {**clean, "OMP_NUM_THREADS": "1", **env}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.run(command, env=env, cwd="/", timeout=300, **pipes)


def run(command: list[str], code: int = 0, **env: str) -> str:
    done = start(command, **env)
    assert done.returncode == code, done.stderr
    return (done.stdout + (done.stderr if code else "")).strip()


def switch(python: str, action: str, code: int = 0, **env: str) -> str:
    return run([python, "-m", "espnet2_spear.autoload", action], code, **env)


@pytest.mark.second_env
def test_on_and_off_in_plain_runs_and_children(python: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SPAWN, encoding="utf-8")
    knows = [python, "-c", "import sys; print('espnet2_spear' in sys.modules)"]
    assert switch(python, "status").startswith("off: ")
    assert run(knows) == "False"
    packages = Path(switch(python, "status").split()[-1]).with_name("packages.pth")
    try:
        assert switch(python, "on").startswith("on: ")
        assert switch(python, "on").startswith("on: ")  # again is fine
        assert switch(python, "status").startswith("on: ")
        assert run(knows) == "True"
        # ESPnet: of the environment of the tests, without its start-up files.
        lines = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), SHIM]
        packages.write_text("\n".join(lines), encoding="utf-8")
        # The script does not mention the plugin; ESPnet 202511 prints things first.
        lines = run([python, str(script), "spawn", "espnet"]).splitlines()
        assert lines[0] == "True False" and lines[-1] == "True"
        # Its own switch still works, and so does ours without site-packages.
        assert run(knows, SPEAR_ESPNET_DISABLE="1") == "True"
        assert run([python, "-S", *knows[1:]]) == "False"
    finally:
        packages.unlink(missing_ok=True)
        path = switch(python, "off").split()[-1]
    assert not Path(path).exists() and run(knows) == "False"
    assert "off already" in switch(python, "off")


def test_an_orphaned_or_broken_start_up_file_keeps_python_starting(
    python: str, tmp_path: Path
) -> None:
    switch(python, "on")
    site = Path(switch(python, "status").split()[-1]).parent
    installed = site / "installed.pth"
    kept = installed.read_text(encoding="utf-8")
    try:
        installed.unlink()  # as after pip uninstall
        done = start([python, "-c", "print(1)"])
        assert (done.stdout, done.stderr) == ("1\n", "")
        broken = tmp_path / "espnet2_spear"
        broken.mkdir()
        (broken / "__init__.py").write_text("raise RuntimeError('half installed')")
        installed.write_text(str(tmp_path), encoding="utf-8")
        done = start([python, "-c", "print(1)"])
        assert done.stdout == "1\n"
        # Python reads start-up files of a virtual environment twice.
        said = set(done.stderr.splitlines())
        assert said == {"espnet2_spear autoload: half installed"}
    finally:
        installed.write_text(kept, encoding="utf-8")
        switch(python, "off")


def test_a_plugin_that_is_not_installed_is_not_switched_on(python: str) -> None:
    site = Path(switch(python, "status").split()[-1]).parent
    kept = (site / "installed.pth").read_text(encoding="utf-8")
    try:
        (site / "installed.pth").unlink()
        out = switch(python, "on", code=1, PYTHONPATH=str(ROOT))
        assert "install it first" in out
    finally:
        (site / "installed.pth").write_text(kept, encoding="utf-8")
    assert switch(python, "status").startswith("off")


def test_what_cannot_be_written_is_said(monkeypatch, tmp_path: Path) -> None:
    missing = tmp_path / "file" / autoload.FILE_NAME
    missing.parent.touch()
    monkeypatch.setattr(autoload, "startup_file", lambda: missing)
    with pytest.raises(UserError, match="spear-python"):
        autoload.main(["on"])
    missing.parent.unlink()
    missing.mkdir(parents=True)  # neither readable nor removable as a file
    with pytest.raises(UserError, match="cannot be removed"):
        autoload.main(["off"])
    assert autoload.status() == "changed"


def test_the_doctor_shows_it(monkeypatch, tmp_path: Path) -> None:
    path = tmp_path / autoload.FILE_NAME
    monkeypatch.setattr(autoload, "startup_file", lambda: path)
    for content, expected in (
        (None, "off"),
        (autoload.CONTENT, "on"),
        ("import espnet2_spear", "changed"),
    ):
        if content is not None:
            path.write_text(content, encoding="utf-8")
        lines: list[str] = []
        report = doctor.Report(lines.append)
        doctor.check_doors(report)
        (line,) = [text for text in lines if "autoload" in text]
        assert line.split()[1] == expected
        assert ("autoload on" in str(report.problems)) == (expected == "changed")

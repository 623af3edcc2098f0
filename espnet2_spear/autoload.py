"""``python -m espnet2_spear.autoload on|off|status``: registration without an import.

``on`` writes one file into this Python's site-packages, which makes every start of this
Python import the plugin (under 5 ms; neither torch nor ESPnet). Then an unmodified
``asr.sh``, ``espnet.load``, the ``espnet`` command and spawned processes know the
plugin's classes. ``off`` removes the file. It is never switched on by itself, and does
nothing once the plugin is uninstalled.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from espnet2_spear.errors import UserError
from espnet2_spear.fileio.atomic import write_atomically
from espnet2_spear.fileio.explain import command

# Read in alphabetical order: behind those that put the plugin on the path.
FILE_NAME = "zz_espnet2_spear_autoload.pth"
# Python executes lines of .pth files that begin with import. The plugin's absence is
# what remains after an uninstallation and no news; anything else is said in one line
# and must not keep Python from starting.
_CODE = """\
try:
 import espnet2_spear
except Exception as e:
 if not isinstance(e, ModuleNotFoundError) or e.name != "espnet2_spear":
  print("espnet2_spear autoload:", e, file=sys.stderr)
"""
CONTENT = f"import sys; exec({_CODE!r})\n"


def startup_file() -> Path:
    """Path of the start-up file of this Python, whether it exists or not."""
    return Path(sysconfig.get_path("purelib")) / FILE_NAME


def status() -> str:
    """``on``, ``off``, or ``changed``: the file is another version's, or unreadable."""
    try:
        same = startup_file().read_bytes() == CONTENT.encode()
    except FileNotFoundError:
        return "off"
    except OSError:
        return "changed"
    return "on" if same else "changed"


def switch_on() -> None:
    """Write the start-up file, if the plugin would be found by it."""
    path = startup_file()
    # A Python that is started elsewhere must find the plugin, too.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    find = [sys.executable, "-c", "import espnet2_spear"]
    if subprocess.run(find, cwd=path.anchor, env=env, capture_output=True).returncode:
        raise UserError(
            "espnet2_spear is found only by this process's working folder or "
            "PYTHONPATH; install it first (in a checkout: pip install -e .)"
        )
    try:
        write_atomically(path, CONTENT.encode())
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): use an environment of your "
            "own (python -m venv), or `spear-python` in place of python"
        ) from error


def switch_off() -> None:
    """Remove the start-up file, if there is one."""
    path = startup_file()
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{path} cannot be removed ({error.strerror}): ask whoever owns it"
        ) from error


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = argparse.ArgumentParser(
        prog="python -m espnet2_spear.autoload",
        description="Let every start of this Python make the plugin known to ESPnet, "
        "or not any more. Nothing else of the environment is changed.",
    )
    parser.add_argument("action", choices=("on", "off", "status"))
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Switch, or say how it is."""
    path, before = startup_file(), status()
    if args.action == "on":
        switch_on()
        print(f"on: {path} (undo: python -m espnet2_spear.autoload off)")
    elif args.action == "off":
        switch_off()
        print("off:", "was off already:" if before == "off" else "removed", path)
    else:
        print(f"{before}: {path}")


if __name__ == "__main__":
    main()

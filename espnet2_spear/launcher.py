"""``spear-python``: python, with the classes of this package known to ESPnet.

For every place where ESPnet's recipes let you choose the Python, such as
``asr.sh --python spear-python``. Takes what python takes: ``-m module``, ``-c code``, a
script, ``-`` or nothing for standard input, python's own options before them.
``python -m espnet2_spear.launcher`` is the same.
"""

from __future__ import annotations

import os
import runpy
import sys
from types import ModuleType

import espnet2_spear

_SELF = "espnet2_spear.launcher"


def split_args(args: list[str]) -> tuple[list[str], list[str]]:
    """Divide a python command line.

    Args:
        args: what follows ``python``.

    Returns:
        options of the interpreter, and the rest, which is empty or begins with ``-m``,
        ``-c``, ``-`` or a script; ``-um x`` is given back as ``-u`` and ``-m x``.

    Raises:
        ValueError: an option lacks its argument.
    """
    options: list[str] = []
    index = 0
    while index < len(args):
        arg = args[index]
        if arg == "-" or not arg.startswith("-"):
            return options, args[index:]
        index += 1
        if arg == "--":
            return options, args[index:]
        if arg.startswith("--"):  # --version, --help and the like
            options.append(arg)
            if arg == "--check-hash-based-pycs":
                options += args[index : index + 1]
                index += 1
            continue
        for position, letter in enumerate(arg[1:], start=2):
            if letter not in "mcWX":
                options.append(f"-{letter}")
                continue
            value = arg[position:]
            if not value:
                if index == len(args):
                    raise ValueError(f"Argument expected for the -{letter} option")
                value = args[index]
                index += 1
            if letter in "mc":
                return options, [f"-{letter}", value, *args[index:]]
            options += [f"-{letter}", value]
            break
    return options, []


def main() -> None:
    """Entry point of the console script."""
    try:
        options, command = split_args(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"spear-python: {error}")
    python = sys.executable
    if options:  # They concern the start of an interpreter: start one with them.
        os.execv(python, [python, *options, "-m", _SELF, *command])
    if not command and sys.stdin is not None and sys.stdin.isatty():
        os.execv(python, [python, "-i", "-c", "import espnet2_spear"])
    espnet2_spear.register()
    _run(command)


def _run(command: list[str]) -> None:
    """Run what ``split_args`` left, in a main module of its own."""
    mode = command[0] if command else "-"
    if mode == "-m":
        sys.argv = command[1:]
        _set_first_path(os.getcwd())
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif mode == "-c":
        sys.argv = ["-c", *command[2:]]
        _set_first_path("")
        _run_code(command[1], "<string>")
    elif mode == "-":
        sys.argv = command or [""]
        _set_first_path("")
        _run_code(sys.stdin.read(), "<stdin>")
    else:
        sys.argv = command
        if os.path.isfile(mode):
            _set_first_path(os.path.dirname(os.path.realpath(mode)))
        elif not os.path.exists(mode):
            sys.exit(f"spear-python: can't open file {os.path.abspath(mode)!r}")
        else:
            # run_path puts a folder or an archive first itself, as it is given.
            _set_first_path(None)
            mode = os.path.abspath(mode)
        runpy.run_path(mode, run_name="__main__")


def _run_code(code: str, name: str) -> None:
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    exec(compile(code, name, "exec", dont_inherit=True), module.__dict__)


def _set_first_path(folder: str | None) -> None:
    """Replace the folder of this launcher, which Python put first, by another."""
    if not getattr(sys.flags, "safe_path", False) and not sys.flags.isolated:
        sys.path[:1] = [] if folder is None else [folder]


if __name__ == "__main__":
    main()

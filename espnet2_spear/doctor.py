"""``python -m espnet2_spear.doctor``: what is installed, registered, and wrong."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from espnet2_spear import __version__, autoload, registration
from espnet2_spear.errors import CheckpointError
from espnet2_spear.registration import DISABLE, disabled

INSTALL = "pip install espnet2-spear (in a checkout: pip install -e .)"
REPORT_IT = "report it to the plugin with the versions printed above"


class Report:
    """Prints findings and remembers the problems among them."""

    def __init__(self, write: Callable[[str], None] = print) -> None:
        self.write = write
        self.problems: list[str] = []

    def line(self, name: str, text: str) -> None:
        """One finding."""
        self.write(f"  {name:<24} {text}")

    def problem(self, text: str, remedy: str) -> None:
        """Something wrong, and what to do about it."""
        self.problems.append(f"{text}\n      remedy: {remedy}")


def requirements() -> list[tuple[Requirement, str]]:
    """Requirements of the plugin, and the extra that needs each ("": all).

    Empty if the plugin was not installed.
    """
    try:
        lines = requires("espnet2-spear") or []
    except PackageNotFoundError:
        return []
    return [(Requirement(x), x.partition("extra == ")[2].strip("\"'")) for x in lines]


def check_versions(report: Report) -> None:
    """Python and the packages."""
    report.write("Versions")
    report.line("python", f"{platform.python_version()} ({sys.executable})")
    report.line("espnet2-spear", __version__)
    wanted = requirements()
    if not wanted:
        text = "the plugin is on the path, but not installed: what it needs is unknown"
        report.problem(text, INSTALL)
    for requirement, extra in wanted:
        name, specifier = requirement.name, requirement.specifier
        remedy = f"pip install --upgrade '{name}{specifier}'"
        try:
            found = version(name)
        except PackageNotFoundError:
            report.line(name, f"- (only for [{extra}])" if extra else "MISSING")
            if not extra:
                report.problem(f"{name} is not installed", remedy)
            continue
        report.line(name, found)
        if not specifier.contains(found, prereleases=True):
            text = f"{name} {found} does not fit: {specifier} is needed"
            report.problem(text, remedy)


def check_torch(report: Report) -> None:
    """Whether torch works, and on what."""
    report.write("Devices")
    for name in ("torch", "torchaudio"):
        try:
            import_module(name)
        except Exception as error:
            remedy = "install torch and torchaudio of the same version, such as 2.11"
            first = str(error).partition("\n")[0]
            report.problem(f"{name} cannot be imported: {first}", remedy)
            return
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report.line("GPUs", ", ".join(gpus) or "none; training runs on the CPU")
    report.line("CPU", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}")


def check_doors(report: Report) -> None:
    """The ways in which the plugin gets into a process."""
    report.write("Front doors")
    text = f"off by {DISABLE}" if disabled() else "registers in ESPnet"
    report.line("import espnet2_spear", text)
    if disabled():
        text = f"{DISABLE}={os.environ[DISABLE]} switches registration off"
        report.problem(text, f"unset {DISABLE}")

    state, file = autoload.status(), autoload.startup_file()
    report.line("autoload", f"{state} ({file})")
    if state == "changed":
        remedy = "python -m espnet2_spear.autoload on (or off)"
        report.problem(f"{file} is of another version of the plugin", remedy)

    door = Path(sys.executable).parent / "spear-python"
    on_path = shutil.which("spear-python")
    report.line("spear-python", on_path or (str(door) if door.exists() else "MISSING"))
    if not door.exists():
        text = "spear-python is not installed beside this Python; asr.sh --python "
        text += "spear-python and processes spawned by it would not know the plugin"
        report.problem(text, INSTALL)
    elif on_path and not door.samefile(on_path):
        text = f"spear-python on the PATH ({on_path}) belongs to another Python"
        report.problem(text, f"activate this environment, or call {door}")


def check_tasks(report: Report, tasks: Sequence[str]) -> None:
    """Import ESPnet's task modules and see what is registered in each."""
    report.write("Registered (importing ESPnet's tasks takes up to a minute)")
    registration.problems.clear()
    for name in tasks if find_spec("espnet2") else ():
        label = name.removeprefix("espnet2.tasks.")
        try:
            with warnings.catch_warnings():
                # Kept in registration.problems, and printed at the end.
                warnings.simplefilter("ignore", registration.RegistrationWarning)
                module = import_module(name)
        except Exception as error:
            # ESPnet's own: older versions lack tasks, and many need extras.
            text = f"{type(error).__name__}: {error}"
            report.line(label, f"- (ESPnet cannot import it; {text})")
            if label in ("abs_task", "asr"):
                text = f"{name} cannot be imported: {text}"
                report.problem(text, "pip install 'espnet[asr]'")
            continue
        there, lacking = registration.registered(module)
        report.line(label, ", ".join(there + [f"NOT {x}" for x in lacking]))
        if lacking and not disabled() and not registration.problems:
            report.problem(f"{name} lacks {', '.join(lacking)}", REPORT_IT)
    for message in registration.problems:
        report.problem(message, REPORT_IT)


def check_model(report: Report, path: Path) -> None:
    """Whether a packed model can be opened here."""
    from espnet2_spear.hub.packed import describe  # needs torch

    report.write(f"Model {path}")
    try:
        facts, lacking = describe(path)
    except CheckpointError as error:
        report.problem(f"the model cannot be opened: {error}", "see above")
        return
    for name, text in facts.items():
        report.line(name, text)
    for file, option in lacking.items():
        text = f"{path} does not hold {file} ({option}): it opens only where {file} is"
        remedy = (
            "where it was trained, pack it by python -m espnet2_spear.bin.task_pack"
        )
        report.problem(text, remedy)


def main(cmd: Sequence[str] | None = None) -> int:
    """Run all checks; the return value is the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m espnet2_spear.doctor",
        description="Print versions, what is registered in which ESPnet task, and what "
        "is wrong. Exits with 1 if something is.",
    )
    tasks = list(registration.TASKS)
    parser.add_argument(
        "--tasks",
        nargs="*",
        choices=tasks,
        default=tasks,
        metavar="MODULE",
        help="Task modules to look into (all), such as espnet2.tasks.asr",
    )
    parser.add_argument(
        "--model", type=Path, help="A packed model: can it be opened here?"
    )
    args = parser.parse_args(cmd)
    report = Report()
    check_versions(report)
    check_torch(report)
    check_doors(report)
    check_tasks(report, args.tasks)
    if args.model is not None:
        check_model(report, args.model)
    count = len(report.problems)
    report.write(f"{count} wrong:" if count else "Nothing is wrong.")
    for problem in report.problems:
        report.write(f"  - {problem}")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())

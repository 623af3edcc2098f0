"""``python -m espnet2_spear.doctor``: what is installed, registered, and wrong."""

from __future__ import annotations

import argparse
import os
import platform
import re
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
from espnet2_spear._hook import DISABLE, disabled
from espnet2_spear.errors import CheckpointError

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


def installed(distribution: str) -> str | None:
    """Version of a distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def requirements() -> list[tuple[Requirement, str]]:
    """What the plugin needs, as it was installed, and which extra needs it ("": all).

    Empty if it was not installed.
    """
    try:
        lines = requires("espnet2-spear") or []
    except PackageNotFoundError:
        return []
    found = []
    for line in lines:
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        found.append((Requirement(line), extra.group(1) if extra else ""))
    return found


def check_versions(report: Report) -> None:
    """Python and the packages."""
    report.write("Versions")
    report.line("python", f"{platform.python_version()} ({sys.executable})")
    report.line("espnet2-spear", __version__)
    wanted = requirements()
    if not wanted:
        report.problem(
            "the plugin is on the path, but not installed: what it needs is unknown",
            "pip install espnet2-spear (in a checkout: pip install -e .)",
        )
    for requirement, extra in wanted:
        name, found = requirement.name, installed(requirement.name)
        report.line(name, found or (f"- (only for [{extra}])" if extra else "MISSING"))
        remedy = f"pip install --upgrade '{name}{requirement.specifier}'"
        if found is None and not extra:
            report.problem(f"{name} is not installed", remedy)
        elif found and not requirement.specifier.contains(found, prereleases=True):
            text = f"{name} {found} does not fit: {requirement.specifier} is needed"
            report.problem(text, remedy)


def check_torch(report: Report) -> None:
    """Whether torch works, and on what."""
    report.write("Devices")
    try:
        import torch
    except (ImportError, OSError) as error:
        report.problem(f"torch cannot be imported: {error}", "install torch again")
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(i) for i in range(gpus)]
    report.line("GPUs", ", ".join(names) or "none; training runs on the CPU")
    report.line("CPU", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}")
    try:
        import_module("torchaudio")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        first = str(error).splitlines()[0]
        report.problem(
            f"torchaudio {installed('torchaudio')} does not fit torch "
            f"{torch.__version__}: {first}",
            "install torch and torchaudio of the same version, such as 2.11",
        )


def check_doors(report: Report) -> None:
    """The ways in which the plugin gets into a process."""
    report.write("Front doors")
    off = disabled()
    report.line(
        "import espnet2_spear", f"off by {DISABLE}" if off else "registers in ESPnet"
    )
    if off:
        text = f"{DISABLE}={os.environ[DISABLE]} switches registration off"
        report.problem(text, f"unset {DISABLE}")
    state = autoload.status()
    report.line("autoload", f"{state} ({autoload.startup_file()})")
    if state == "changed":
        report.problem(
            f"{autoload.startup_file()} is of another version of the plugin",
            "python -m espnet2_spear.autoload on (or off)",
        )
    door = Path(sys.executable).parent / "spear-python"
    on_path = shutil.which("spear-python")
    report.line("spear-python", on_path or (str(door) if door.exists() else "MISSING"))
    if not door.exists():
        report.problem(
            "spear-python is not installed beside this Python; asr.sh --python "
            "spear-python and processes spawned by it would not know the plugin",
            "pip install espnet2-spear (in a checkout: pip install -e .)",
        )
    elif on_path and Path(on_path).resolve() != door.resolve():
        report.problem(
            f"spear-python on the PATH ({on_path}) belongs to another Python",
            f"activate this environment, or call {door}",
        )


def check_tasks(report: Report, tasks: Sequence[str]) -> None:
    """Import ESPnet's task modules and see what is registered in each."""
    report.write("Registered (importing ESPnet's tasks takes up to a minute)")
    if find_spec("espnet2") is None:
        return
    registration.problems.clear()
    with warnings.catch_warnings():
        # Kept in registration.problems, and printed at the end.
        warnings.simplefilter("ignore", registration.RegistrationWarning)
        for name in tasks:
            check_task(report, name)
    for message in registration.problems:
        report.problem(message, REPORT_IT)


def check_task(report: Report, name: str) -> None:
    """Import one task module; what is registered in it is one line of the report."""
    label = name.removeprefix("espnet2.tasks.")
    try:
        module = import_module(name)
    except Exception as error:
        # ESPnet's own: older versions lack tasks, and many need extras.
        text = f"{type(error).__name__}: {error}"
        report.line(label, f"- (ESPnet cannot import it; {text})")
        if label in ("abs_task", "asr"):
            remedy = "pip install 'espnet[asr]'"
            report.problem(f"{name} cannot be imported: {text}", remedy)
        return
    found, lacking = [], []
    for variable in registration.TARGETS[name]:
        kind = variable.split("_")[0]
        for choice, spec in registration.CLASSES[variable].items():
            try:
                cls = registration.entries(module, variable).get(choice)
            except LookupError:
                cls = None
            ours = cls is not None and f"{cls.__module__}:{cls.__qualname__}" == spec
            (found if ours else lacking).append(f"{kind} {choice}")
    report.line(label, ", ".join(found + [f"NOT {lack}" for lack in lacking]))
    if lacking and not disabled() and not registration.problems:
        report.problem(f"{name} lacks {', '.join(lacking)}", REPORT_IT)


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
        report.problem(
            f"{path} does not hold {file} ({option}): it opens only where {file} is",
            "where it was trained, pack it by python -m espnet2_spear.bin.task_pack",
        )


def get_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m espnet2_spear.doctor",
        description="Print versions, what is registered in which ESPnet task, and what "
        "is wrong. Exits with 1 if something is.",
    )
    parser.add_argument(
        "--tasks",
        nargs="*",
        choices=list(registration.TARGETS),
        default=list(registration.TARGETS),
        metavar="MODULE",
        help="Task modules to look into (all), such as espnet2.tasks.asr",
    )
    parser.add_argument(
        "--model", type=Path, help="A packed model: can it be opened here?"
    )
    return parser


def main(cmd: Sequence[str] | None = None) -> int:
    """Run all checks; the return value is the exit code."""
    args = get_parser().parse_args(cmd)
    report = Report()
    check_versions(report)
    check_torch(report)
    check_doors(report)
    check_tasks(report, args.tasks)
    if args.model is not None:
        check_model(report, args.model)
    if not report.problems:
        report.write("Nothing is wrong.")
        return 0
    report.write(f"{len(report.problems)} wrong:")
    for problem in report.problems:
        report.write(f"  - {problem}")
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""Imports run one way, from a room to those below it, and never in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import ROOT

PACKAGE = "espnet2_spear"
# From the ground up; rooms of one line do not import each other. docs/architecture.md
# says what each is for.
FLOORS = [
    {"constants", "errors", "launcher", "registration", "start", "torch_private"},
    {"zipformer", "fileio"},
    {"optimizers", "schedulers"},
    {"mvq"},
    {"teachers"},
    {"codes"},
    {"spear"},
    {"data"},
    {"train"},
    {"hub"},
    {"asr", "tasks"},
    {"autoload"},
    {"doctor"},
    {"bin"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def sources() -> dict[str, Path]:
    """Every module of the package and of the benchmarks, by its dotted name."""
    modules = {}
    for top, folder in ((PACKAGE, ROOT / PACKAGE), ("", ROOT / "benchmarks")):
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            name = ".".join([*filter(None, [top]), *parts]).removesuffix(".__init__")
            modules[name] = file
    return modules


def imports(file: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of ours that a file names in an import, wherever it stands."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = str(node.module)
            if node.level:  # relative to the file's folder, or to one above
                folder = file.parents[node.level - 1].relative_to(ROOT)
                module = ".".join(filter(None, [*folder.parts, node.module]))
            # `from package.room import file` names a file, or what a file defines.
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                found.add(whole if whole in modules else module)
    return found & set(modules)


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def test_every_room_has_a_floor() -> None:
    rooms = {room for room in map(room_of, sources()) if room}
    assert rooms == set(FLOOR)


def test_rooms_import_downwards() -> None:
    modules = sources()
    wrong = []
    for module, file in modules.items():
        room = room_of(module)
        for target in imports(file, modules):
            other = room_of(target)
            if room is None or other is None or room == other:
                continue
            if FLOOR[other] >= FLOOR[room]:
                wrong.append(f"{module} imports {target}")
    assert not wrong


def test_no_circle_of_files() -> None:
    modules = sources()
    graph = {name: imports(file, modules) - {name} for name, file in modules.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError

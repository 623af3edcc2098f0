"""Make one file of a module and of all that it imports from this package.

So the code that travels with an exported student is the package's own, and there is no
second implementation to keep equal to the first.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "espnet2_spear"


class BundleError(RuntimeError):
    """Modules that cannot be made one file; the message names the statement."""


@dataclass
class _Part:
    """A module without what it imports.

    Attributes:
        name: dotted.
        summary: first line of its docstring.
        body: its source.
        names: what it defines at the top.
        needs: modules of the package, in the order of their import.
        imports: import statements that stay.
    """

    name: str
    summary: str
    body: str
    names: set[str]
    needs: list[str] = field(default_factory=list)
    imports: list[str] = field(default_factory=list)


def bundle(root: str) -> str:
    """Return the source of one file that does what a module does.

    Args:
        root: dotted name; its relative imports stay as they are.

    Raises:
        BundleError: two modules define the same name, or an import takes a whole
            module of the package.
    """
    parts: dict[str, _Part] = {}
    _collect(root, parts)
    owner: dict[str, str] = {}
    for part in parts.values():
        for name in part.names:
            if name in owner:
                raise BundleError(
                    f"{owner[name]} and {part.name} both define {name}: they cannot "
                    "share a file; rename one"
                )
            owner[name] = part.name
    header = _merge([line for part in parts.values() for line in part.imports])
    sections = [
        f"# --- {part.name}: {part.summary}\n\n{part.body.strip()}"
        for part in parts.values()
    ]
    return "\n\n\n".join(["\n".join(header), *sections]) + "\n"


def _merge(imports: list[str]) -> list[str]:
    """Sort import statements, one for every module that names come from."""
    plain, names = set(), {}
    for line in imports:
        (node,) = ast.parse(line).body
        if isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            found = {ast.unparse(alias) for alias in node.names}
            names[source] = names.get(source, set()) | found
        else:
            plain.add(line)
    # Relative imports last: "." sorts before letters.
    order = sorted(names, key=lambda source: (source.startswith("."), source))
    merged = [
        f"from {source} import {', '.join(sorted(names[source]))}" for source in order
    ]
    return [*sorted(plain), *merged]


def _collect(name: str, parts: dict[str, _Part]) -> None:
    """Add a module behind all that it needs."""
    part = _read(name)
    for needed in part.needs:
        if needed not in parts:
            _collect(needed, parts)
    parts[name] = part


def _read(name: str) -> _Part:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise BundleError(f"{name}: no source file")
    source = Path(spec.origin).read_text(encoding="utf-8")
    tree = ast.parse(source)
    lines = source.splitlines()
    part = _Part(
        name,
        (ast.get_docstring(tree) or "").partition("\n")[0],
        "",
        {n for statement in tree.body for n in _defined(statement)},
    )
    if ast.get_docstring(tree) is not None:
        _blank(lines, tree.body[0])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(
            alias.name.partition(".")[0] == PACKAGE for alias in node.names
        ):
            raise BundleError(f"{name}, line {node.lineno}: import names, not modules")
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "__future__":
                _blank(lines, node)
            elif node.module.partition(".")[0] == PACKAGE:
                part.needs.append(node.module)
                _inline(lines, node, name)
    for node in tree.body:
        outside = isinstance(node, ast.Import) or (
            isinstance(node, ast.ImportFrom)
            and node.module != "__future__"
            and (node.module or "").partition(".")[0] != PACKAGE
        )
        if outside:
            part.imports.append(ast.unparse(node))
            _blank(lines, node)
    part.body = "\n".join(lines)
    return part


def _inline(lines: list[str], node: ast.ImportFrom, name: str) -> None:
    """Replace an import of names that are defined above it in the same file."""
    if any(_is_module(f"{node.module}.{alias.name}") for alias in node.names):
        raise BundleError(f"{name}, line {node.lineno}: import names, not modules")
    renamed = [f"{a.asname} = {a.name}" for a in node.names if a.asname]
    _blank(lines, node)
    indent = " " * node.col_offset
    if renamed or indent:
        lines[node.lineno - 1] = indent + ("; ".join(renamed) or "pass")


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _blank(lines: list[str], node: ast.stmt) -> None:
    for number in range(node.lineno - 1, node.end_lineno or node.lineno):
        lines[number] = ""


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    for target in targets:
        yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))

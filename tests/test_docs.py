"""Pages name what exists: sections, files, functions, tests and links."""

import ast
import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import espnet2_spear

TRACKED = [
    ROOT / name
    for name in subprocess.check_output(
        ["git", "ls-files", "-z"], cwd=ROOT, text=True
    ).split("\0")
    if name
]
TRACKED = [p for p in TRACKED if p.is_file() and not p.is_symlink()]
PAGES = [p for p in TRACKED if p.suffix == ".md"]
METHOD = ROOT / "docs" / "method.md"
TOUR = [p for p in (METHOD, ROOT / "docs" / "architecture.md") if p.exists()]

NUMBER = r"[1-9]\.[1-9]"
CITED = re.compile(rf"\[({NUMBER}(?:(?:, | to ){NUMBER})*)(?: of [\w./]+)?\](?!\()")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """What a person wrote to be read: a page without its code, or comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    return "\n".join(re.findall(r"#.*", text))


def cited(path: Path) -> set[str]:
    found = {n for m in CITED.findall(prose(path)) for n in re.findall(NUMBER, m)}
    return found


def test_cited_sections_exist() -> None:
    heads = re.findall(rf"^### ({NUMBER}) ", METHOD.read_text(), re.MULTILINE)
    assert len(heads) == len(set(heads)) > 20
    citing = [p for p in TRACKED if p.suffix in (".md", ".py", ".sh", ".yaml")]
    missing = {name(p): cited(p) - set(heads) for p in citing}
    assert not {p: numbers for p, numbers in missing.items() if numbers}
    published = (ROOT / "conf").glob("train_spear_[blx]*.yaml")
    assert all(len(cited(p)) >= 10 for p in published)


def test_index_of_pages_is_complete() -> None:
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\((\w+\.md)\)", text))
    pages = {p.name for p in PAGES if p.parent == ROOT / "docs"}
    assert linked == pages - {"README.md"}


def test_version_is_the_same_everywhere() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    latest = re.search(r"^## (\d+\.\d+\.\d+),", changes, re.MULTILINE)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert latest and latest[1] == cited["version"] == espnet2_spear.__version__


@functools.cache
def definitions(path: Path) -> frozenset[str]:
    """Functions, classes with their methods, and variables of a module."""
    found: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    collect(node.body, f"{node.name}.")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = (
                    node.targets if isinstance(node, ast.Assign) else [node.target]
                )
                found.update(prefix + t.id for t in targets if isinstance(t, ast.Name))

    collect(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return frozenset(found)


def references(page: Path) -> Iterator[tuple[str, str | None]]:
    """Files named in a page in `backticks`, with what is named in them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for quoted in re.findall(r"`([^`\s]+)`", text):
        path, _, inside = quoted.partition("::")
        if re.fullmatch(r"[\w./-]+\.(py|sh|yaml|md|txt)|[\w./-]+/", path):
            yield path, inside or None


@pytest.mark.parametrize("page", TOUR, ids=name)
def test_named_files_and_functions_exist(page: Path) -> None:
    wrong, count = [], 0
    for path, inside in references(page):
        places = (ROOT, ROOT / "espnet2_spear", ROOT / "tests", ROOT / "egs2/spear")
        files = [p / path for p in places if (p / path).exists()]
        count += 1
        if not files or (inside and inside not in definitions(files[0])):
            wrong.append(f"{path}::{inside}" if inside else path)
    assert not wrong and count > 20


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in heads}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong

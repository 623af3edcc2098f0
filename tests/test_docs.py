"""Pages name what exists: sections, files, functions, tests and links."""

import ast
import functools
import re
import shlex
import subprocess
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from espnet2.tasks.asr import ASRTask
from student_files import write_student

import espnet2_spear
from espnet2_spear.asr.encoder.zipformer_encoder import ZipformerEncoder
from espnet2_spear.asr.frontend.spear import SpearFrontend

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


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """What a person wrote to be read: a page without its code; comments, docstrings."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    found = re.findall(r"#.*", text)
    if path.suffix == ".py":
        nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, DOCUMENTED)]
        found += [ast.get_docstring(node) or "" for node in nodes]
    return "\n".join(found)


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


COMMANDS = sorted(
    path.stem
    for path in (ROOT / "espnet2_spear/bin").glob("*.py")
    if hasattr(import_module(f"espnet2_spear.bin.{path.stem}"), "get_parser")
)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_as_pages_show_them(command: str) -> None:
    """Their help can be printed, and they have the options."""
    parser = import_module(f"espnet2_spear.bin.{command}").get_parser()
    assert "--help" in parser.format_help()
    known = {*parser._option_string_actions, "--log_level"}
    for page in PAGES:
        blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.DOTALL)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            _, found, rest = line.partition(f"espnet2_spear.bin.{command} ")
            shown = {w.split("=")[0] for w in rest.split() if w.startswith("--")}
            assert not found or shown <= known, f"{page}: {line}"


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


def options_with_sizes() -> list[tuple[str, str]]:
    """Options of a frontend or encoder that pages give for a student's file."""
    form = r"--\w+_conf [^`\"]*arch\.name=[^`\"\s]+|\w+_conf: \{arch: \{name: [^`]*"
    texts = {name(p): p.read_text(encoding="utf-8") for p in PAGES}
    return [(p, words) for p, text in texts.items() for words in re.findall(form, text)]


@pytest.mark.parametrize("rate", [25, 50])
def test_documented_options_fit_students_of_every_rate(
    tmp_path: Path, rate: int
) -> None:
    """Those of 25 Hz have the sizes of no name."""
    arch = {"name": "tiny", "output_downsampling_factor": 50 // rate}
    file = write_student(tmp_path, arch=arch)
    found = options_with_sizes()
    assert {page for page, _ in found} >= {
        *("README.md", "docs/checkpoints.md", "docs/zipformer.md"),
        *("egs2/spear/README.md", "egs2/spear/asr1/README.md"),
    }
    named = r"_conf arch(\.name)?=NAME|_conf: \{arch: base"
    assert not [p for p in PAGES if re.search(named, p.read_text(encoding="utf-8"))]
    for page, words in found:
        words = re.sub(r"\$student|PATH|[\w/.]+\.pth", str(file), words)
        if words.startswith("--"):
            words = words.replace("\\\n", " ")
            args = ASRTask.get_parser().parse_args(shlex.split(words))
            conf = {"frontend": args.frontend_conf, "encoder": args.encoder_conf}
        else:
            conf = yaml.safe_load(words)
            conf = {key.removesuffix("_conf"): value for key, value in conf.items()}
        if conf.get("frontend"):
            student = SpearFrontend(**conf["frontend"]).upstream
        else:
            student = ZipformerEncoder(1, **conf["encoder"])
        assert student.config.frame_rate == rate, (page, words)

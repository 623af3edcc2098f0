"""Private names of torch: in one file, and public torch gives the same results."""

import ast
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_plan import MINI, options_of
from torch import Tensor, nn

from espnet2_spear import torch_private
from espnet2_spear.bin import spear_plan
from espnet2_spear.errors import UserError
from espnet2_spear.hub import graph
from espnet2_spear.hub.graph import Network
from espnet2_spear.train import simulate

PACKAGE = ROOT / "espnet2_spear"


def tensors(*sizes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(sizes))
    return [torch.randn(n, 7, generator=generator).to(dtype) for n in sizes]


def norms(function: Callable, dtype: torch.dtype) -> list[Tensor]:
    return list(function(tensors(3, 900, 1, dtype=dtype)))


def copied(function: Callable, dtype: torch.dtype) -> list[Tensor]:
    targets = tensors(4, 5, dtype=dtype)
    views = [x[::2] for x in targets]
    function(views, [x[::2] for x in tensors(4, 5, 6, dtype=dtype)[:2]])
    return targets


def multiplied(function: Callable, dtype: torch.dtype) -> list[Tensor]:
    targets = tensors(3, 40, dtype=dtype)
    function(targets, torch.tensor(0.3, dtype=dtype))
    return targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "plain", "results"),
    [
        ("foreach_norm", torch_private.plain_norms, norms),
        ("foreach_copy_", torch_private.plain_copy_, copied),
        ("foreach_mul_", torch_private.plain_mul_, multiplied),
    ],
)
def test_one_tensor_after_the_other(
    name: str, plain: Callable, results: Callable, dtype: torch.dtype
) -> None:
    """To the bit: trainings do not depend on which of both runs."""
    private = getattr(torch_private, name)
    assert private is not plain
    for a, b in zip(results(private, dtype), results(plain, dtype), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bias", [torch.arange(40.0), None])
def test_a_linear_map(bias: Tensor | None) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN")
    x, weight = tensors(30, 40)
    arguments = x, weight, bias, "none", [], ""
    got = torch_private.onednn_linear(*arguments)
    torch.testing.assert_close(got, torch_private.plain_linear(*arguments))


def test_hooks_are_seen_or_feared() -> None:
    layer = nn.Linear(2, 2)
    assert not torch_private.has_hooks(layer)
    handle = layer.register_forward_pre_hook(lambda *_: None)
    assert torch_private.has_hooks(layer)
    handle.remove()
    assert not torch_private.has_hooks(layer)
    assert torch_private.has_hooks(SimpleNamespace(_forward_hooks={}))


def test_changes_are_seen_or_feared() -> None:
    (x,), nameless = tensors(3), SimpleNamespace()
    before = torch_private.version(x)
    assert torch_private.version(x) == before
    x += 1
    assert torch_private.version(x) != before
    assert torch_private.version(nameless) != torch_private.version(nameless)


def test_a_plan_by_real_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of("mini")
    assert MINI.is_file()
    plan = (options, False, 2, 1.0)
    expected = spear_plan.simulate(*plan)
    monkeypatch.setattr(torch_private, "FakeTensorMode", None)
    random.seed(0)
    assert spear_plan.simulate(*plan) == expected
    monkeypatch.setattr(simulate, "TorchDispatchMode", object)
    with pytest.raises(UserError, match="install another version"):
        spear_plan.simulate(*plan)


class Sums(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(dim=1) / x.size(1)


@pytest.mark.parametrize("single", [True, False])
def test_a_graph(monkeypatch: pytest.MonkeyPatch, single: bool) -> None:
    """Without torch's setting it is one of several frames and utterances, at least."""
    x = torch.arange(24.0).view(2, 4, 3)
    options = {"outputs": ["y"], "lengths": {"x": (1, 99)}, "single_frames": single}
    options["facts"] = {}
    graphs = [Network(Sums(), {"x": x}, **options).program.module()]
    monkeypatch.setattr(torch_private, "fx_config", None)
    graphs.append(Network(Sums(), {"x": x}, **options).program.module())
    monkeypatch.setattr(graph, "ASSERTIONS", set())  # then they stay in the graph
    graphs.append(Network(Sums(), {"x": x}, **options).program.module())
    for made in graphs:
        for batch in (x, x.repeat(2, 3, 1)):
            assert torch.equal(made(batch), Sums()(batch))


def test_the_limit_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = torch._dynamo.config
    with config.patch(recompile_limit=8):
        torch_private.allow_graphs(5)
        assert config.recompile_limit == 8
        torch_private.allow_graphs(9)
        assert config.recompile_limit == 9
    # Where the setting has another name, torch's own limit stands.
    nothing = SimpleNamespace(config=SimpleNamespace())
    monkeypatch.setattr(torch, "_dynamo", nothing)
    torch_private.allow_graphs(99)
    assert not vars(nothing.config)


# Things of torch whose private attributes may be known by name.
THINGS = [
    nn.Module(),
    nn.Parameter(torch.zeros(1)),
    torch.zeros(1).untyped_storage(),
    torch.ops.aten.mm,
    torch.ops.aten.mm.default,
    torch.optim.SGD([torch.zeros(1)]),
    torch.Generator(),
]
ATTRIBUTES = {
    name
    for thing in THINGS
    for name in [*dir(thing), *getattr(thing, "__dict__", ())]
    if name.startswith("_") and not name.startswith("__")
}


def private(name: str) -> bool:
    return any(p.startswith("_") and not p.startswith("__") for p in name.split("."))


def dotted(node: ast.AST, aliases: dict[str, str]) -> str:
    """What an expression of names and attributes is in full, or nothing."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, "")
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value, aliases)
        return owner and f"{owner}.{node.attr}"
    return ""


def private_names(file: Path) -> list[str]:
    """Private names of torch that a file uses, with their lines."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    aliases, found = {}, []
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = node.module if isinstance(node, ast.ImportFrom) else None
            for alias in node.names:
                whole = f"{origin}.{alias.name}" if origin else alias.name
                if whole.split(".")[0] == "torch":
                    short = alias.asname or alias.name
                    aliases[short.split(".")[0]] = (
                        whole if origin or alias.asname else "torch"
                    )
                    if private(whole):
                        found.append((node.lineno, whole))
    for node in nodes:
        if isinstance(node, ast.Attribute):
            whole = dotted(node, aliases)
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            # What a class inherits may be extended: super()._apply(...).
            own = own or ast.unparse(node.value) == "super()"
            if private(whole) or (node.attr in ATTRIBUTES and not own):
                found.append((node.lineno, whole or node.attr))
    return [f"{file.name}:{line}: {name}" for line, name in found]


def test_private_names_are_in_one_file() -> None:
    ours = Path(torch_private.__file__)
    others = [file for file in sorted(PACKAGE.rglob("*.py")) if file != ours]
    assert not [name for file in others for name in private_names(file)]
    assert private_names(ours)


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch._foreach_norm",
        "import torch._dynamo",
        "import torch.nn.functional as F; F._pad",
        "from torch.utils._pytree import tree_map",
        "from torch import _C",
        "from torch.nn import functional; functional._pad",
        "x.untyped_storage()._cdata",
        "model._modules",
        "def f(x): return x._version",
    ],
)
def test_a_private_name_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "file.py").write_text(line, encoding="utf-8")
    assert private_names(tmp_path / "file.py")

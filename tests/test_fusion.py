"""torch.compile by option: equal results, few graphs, none without a compiler."""

import functools
import importlib.util
import random
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT
from test_zipformer_exact import NARROW
from torch._dynamo.utils import counters

from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer import fusion
from espnet2_spear.zipformer.fusion import fuse_chains


@pytest.fixture(autouse=True)
def _plain_afterwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traces and differentiates as the real thing does, but generates no C++."""
    compile_ = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(fusion, "_compiled", {})
    torch._dynamo.reset()
    yield
    fuse_chains(False)


def step(model: SpearEncoder, b: int, t: int) -> torch.Tensor:
    """Gradients of a step."""
    torch.manual_seed(b * t)
    random.seed(b * t)
    fbank, lens = torch.randn(b, t, 24) * 3 - 8, torch.full((b,), t)
    model.zero_grad()
    model.encode(fbank, lens).encoder_out.square().mean().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(grads)


def test_compiled_chains_train_alike() -> None:
    """With few graphs, however many batches of other shapes come."""
    counters.clear()  # of what other tests compiled
    config = replace(NARROW, num_mel_bins=24, regularize=True)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(SpearEncoder(config).train())
    made = []
    for b, t in [(2, 90), (3, 121), (5, 78)]:
        fuse_chains(False)
        expected = step(models[0], b, t)
        assert fuse_chains()
        counters["stats"].clear()
        got = step(models[1], b, t)
        made.append(counters["stats"]["unique_graphs"])
        assert (got - expected).norm() < 1e-5 * expected.norm()
    assert made[0] > 3  # something is compiled
    assert made[1] < 6 and made[2] < 3, made
    assert not counters["graph_break"]


def test_training_goes_on_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(graph, inputs):
        raise RuntimeError("no g++ found\nand more")

    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend=fail)
    )
    torch._dynamo.reset()
    assert not fuse_chains()
    assert "no g++ found" in caplog.text and "C++ compiler" in caplog.text
    model = SpearEncoder(replace(NARROW, num_mel_bins=24)).train()
    assert step(model, 2, 60).isfinite().all()


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = ROOT / "benchmarks" / "zipformer.py"
    monkeypatch.syspath_prepend(path.parent)  # for what it shares with others
    spec = importlib.util.spec_from_file_location("benchmark_of_zipformer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # It changes settings of its process, and shapes that do not matter here.
    monkeypatch.setattr(module, "count_flops", lambda *_: 0)
    monkeypatch.setattr(torch, "set_flush_denormal", lambda _: None)
    return module


def job(benchmark: ModuleType, folder: Path) -> dict:
    """What the benchmark tells a child that trains with --compile."""
    options = ["--size", "tiny", "--compile", "--utterances", "2", "--seconds", "1"]
    options += ["--trials", "2", "--num_threads", str(torch.get_num_threads())]
    args: Namespace = benchmark.get_parser().parse_args(options)
    weights = folder / "weights.pt"
    config = benchmark.save_weights(args, weights)
    more = {"mode": "training", "name": "ours", "weights": str(weights)}
    return {**vars(args), **more, "config": config}


def test_benchmark_compiles_as_the_training_does(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chains alone, in steps that do not count."""
    counters.clear()
    graphs: list[int] = []
    encode = SpearEncoder.encode

    def counted(*args):
        graphs.append(counters["stats"]["unique_graphs"])
        return encode(*args)

    monkeypatch.setattr(SpearEncoder, "encode", counted)
    result = benchmark.run_job(job(benchmark, tmp_path))
    assert len(graphs) == 1 + benchmark.COMPILED_STEPS + len(result["times"]) == 13
    assert graphs[1] > 3 and graphs[-3] == counters["stats"]["unique_graphs"]
    assert result["sum"] > 0


def test_benchmark_measures_nothing_else_without_a_compiler(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, "fuse_chains", lambda: False)
    with pytest.raises(SystemExit, match="leave --compile out"):
        benchmark.run_job(job(benchmark, tmp_path))

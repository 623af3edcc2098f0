"""Quantizer: codes equal to the reference, search, files, bad input."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from teacher_files import Malicious
from test_mvq_search import obvious_search

from espnet2_spear.bin import mvq_export
from espnet2_spear.mvq import search as refine
from espnet2_spear.mvq import search_cpu as refine_cpu
from espnet2_spear.mvq.baselines import ResidualQuantizer
from espnet2_spear.mvq.files import load_quantizer
from espnet2_spear.mvq.quantizer import Quantizer, QuantizerError
from espnet2_spear.mvq.search import GramTables, kept_per_level, num_kept
from espnet2_spear.mvq.training import quantizer_losses


@pytest.fixture
def reference(data_dir):
    """Vectors, codes after 0, 1, 2 and 5 passes, sums of centres."""
    return np.load(data_dir / "mvq.npz")


@pytest.fixture
def library_file(data_dir):
    """As the multi-quantization library saved it."""
    return data_dir / "mvq_library.pt"


@pytest.fixture(params=["compiled", "tensors"])
def search(request, monkeypatch):
    """Both forms of the search: that of CPUs and that of GPUs, here on a CPU."""
    if request.param == "tensors":
        monkeypatch.setattr(refine, "_refine_compiled", refine.refine_tensors)


def random_quantizer(dim: int, size: int, num: int, seed: int = 0) -> Quantizer:
    torch.manual_seed(seed)
    quantizer = Quantizer(dim, size, num)
    with torch.no_grad():
        quantizer.centers += 0.1 * torch.randn(quantizer.centers.shape)
        quantizer.logits_scale.fill_(0.1)
        quantizer.centers_scale.fill_(0.05)
    return quantizer


def random_vectors(quantizer: Quantizer, count: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, quantizer.num_codebooks)
    codes = torch.randint(quantizer.codebook_size, shape, generator=generator)
    x = quantizer.decode(codes).detach()
    return x + x.std() * torch.randn(x.shape, generator=generator)


def squared_errors(quantizer, x, codes) -> torch.Tensor:
    return (quantizer.sum_centers(codes).double() - x).square().sum(dim=-1).detach()


@pytest.mark.parametrize("passes", [0, 1, 2, 5])
def test_codes_equal_reference(search, reference, library_file, passes):
    quantizer = load_quantizer(library_file)
    codes = quantizer.encode(torch.tensor(reference["x"]), refine_iters=passes)
    assert codes.dtype == torch.int64
    np.testing.assert_array_equal(codes, reference[f"idx{passes}"])


def test_decode_equals_library(reference, library_file):
    quantizer = load_quantizer(library_file)
    assert quantizer.identity == "94e7c8e6"
    decoded = quantizer.decode(torch.tensor(reference["idx5"].astype(np.int64)))
    np.testing.assert_allclose(decoded.detach(), reference["decoded"], atol=1e-5)


def test_losses_equal_reference(reference, library_file):
    quantizer = load_quantizer(library_file)
    losses = quantizer_losses(quantizer, torch.tensor(reference["x"]), 2)
    expected = (0.36663, 4.92493, 0.02627, 0.04123)
    for loss, value in zip(losses, expected, strict=True):
        assert float(loss.detach()) == pytest.approx(value, abs=1e-5)
    assert losses.reconstruction.requires_grad and losses.logprob.requires_grad
    assert not losses.index_entropy.requires_grad


def test_losses_under_autocast_are_those_without(reference, library_file):
    """Of vectors in low precision, too, as a teacher under autocast gives them."""
    quantizer = load_quantizer(library_file)
    x = torch.tensor(reference["x"]).bfloat16()
    plain = quantizer_losses(quantizer, x.float(), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = quantizer_losses(quantizer, x, 2)
    for loss, expected in zip(under, plain, strict=True):
        assert loss.dtype == torch.float32 and torch.equal(loss, expected)


def test_codes_equal_full_reference(search, golden_dir):
    ref = np.load(golden_dir / "mvq.npz")
    quantizer = Quantizer(16, 16, 4)
    with torch.no_grad():
        quantizer.to_logits.weight.copy_(torch.tensor(ref["W"]))
        quantizer.to_logits.bias.copy_(torch.tensor(ref["b"]))
        quantizer.centers.copy_(torch.tensor(ref["centers"]))
        quantizer.logits_scale.fill_(float(ref["logits_scale"]))
        quantizer.centers_scale.fill_(float(ref["centers_scale"]))
    for passes in (0, 1, 2, 5):
        codes = quantizer.encode(torch.tensor(ref["x"]), passes)
        np.testing.assert_array_equal(codes, ref[f"idx{passes}"])


@pytest.mark.parametrize("size, num", [(2, 16), (4, 1), (16, 32), (64, 4), (256, 16)])
def test_compiled_search_equals_tensors(size, num):
    quantizer = random_quantizer(48, size, num).eval()
    x = random_vectors(quantizer, 200)
    shuffled = torch.randperm(num, generator=torch.Generator().manual_seed(2))
    for order in (torch.arange(num), shuffled):
        tables, codes = quantizer.tables(), torch.zeros(len(x), num, dtype=torch.int64)
        linear = tables.linear_terms(x).detach()
        got = refine.refine(tables, linear, codes, 4, order)
        rows = codes[:, order] + order * size
        expected = refine.refine_tensors(tables, linear, rows, 4, order) - order * size
        assert (got[:, order] == expected).all(dim=1).float().mean() > 0.98
        assert not torch.equal(got, codes)


def test_search_survives_nan_and_infinity(search):
    """As a training that diverges has them, before its loss is looked at."""
    quantizer = random_quantizer(8, 64, 8).eval()
    x = random_vectors(quantizer, 50)
    tables, codes = quantizer.tables(), quantizer.logits(x).argmax(dim=-1)
    linear = tables.linear_terms(x).detach()
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = linear.clone()
        broken[10:20] = bad
        broken[30:, ::3] = bad
        found = refine.refine(tables, broken, codes, 3)
        assert found.min() >= 0 and found.max() < 64
        assert torch.equal(found[:10], refine.refine(tables, linear, codes, 3)[:10])
        tables.products[3] = bad
        refine.refine(tables, broken, codes, 3)
        tables = GramTables(quantizer.scaled_centers().detach())


def test_threads_share_the_vectors(monkeypatch):
    quantizer = random_quantizer(16, 64, 4).eval()
    x = random_vectors(quantizer, 500)
    expected = quantizer.encode(x)
    counts = []
    search = refine_cpu._refine_all

    def counted(products, linear, *rest):
        counts.append(len(linear))
        return search(products, linear, *rest)

    monkeypatch.setattr(refine_cpu, "_refine_all", counted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(quantizer.encode(x), expected)
    assert sorted(counts) == [166, 167, 167]


def test_kept_candidates():
    assert [num_kept(2**i, 256) for i in range(5)] == [16, 16, 32, 32, 64]
    assert [num_kept(2**i, 16) for i in range(6)] == [8, 8, 16, 16, 32, 32]
    assert num_kept(4**5, 256) == 128
    assert kept_per_level(1, 256) == [1] and kept_per_level(2, 256) == [16, 1]
    assert kept_per_level(8, 256) == [16, 16, 32, 1]
    assert kept_per_level(8, 2) == [2, 4, 16, 1]  # no more than there are pairs


def test_chunks_and_leading_dimensions():
    quantizer = random_quantizer(16, 16, 8)
    x = random_vectors(quantizer, 60)
    codes = quantizer.encode(x)
    assert torch.equal(quantizer.encode(x, max_frames=7), codes)
    assert torch.equal(quantizer.encode(x.view(3, 20, 16)), codes.view(3, 20, 8))
    assert torch.equal(quantizer.encode(x[5]), codes[5])
    assert quantizer.encode(x[:0]).shape == (0, 8)
    assert quantizer.decode(codes.view(3, 20, 8)).shape == (3, 20, 16)


def test_equal_centers_are_no_trouble(search):
    quantizer = random_quantizer(16, 64, 4)
    with torch.no_grad():
        quantizer.centers[:, 32:] = quantizer.centers[:, :32]
    x = random_vectors(quantizer, 50)
    single = random_quantizer(16, 32, 4)
    with torch.no_grad():
        single.centers.copy_(quantizer.centers[:, :32])
    error = squared_errors(quantizer, x, quantizer.encode(x))
    assert error.sum() < 1.1 * squared_errors(single, x, single.encode(x)).sum()


def test_large_common_offset_costs_no_accuracy():
    quantizer = random_quantizer(32, 64, 4)
    x = random_vectors(quantizer, 20)
    offset = 100 * torch.randn(32, generator=torch.Generator().manual_seed(2))
    codes = obvious_search(quantizer, x, 2)
    with torch.no_grad():
        quantizer.centers[0] += offset / np.exp(10 * 0.05)
        quantizer.to_logits.bias -= np.exp(1.0) * (quantizer.to_logits.weight @ offset)
    moved = quantizer.encode(x + offset, 2)
    assert (moved == codes).float().mean() > 0.97


def test_tables_follow_the_centers():
    quantizer = random_quantizer(16, 16, 4).eval()
    x = random_vectors(quantizer, 40)
    before = quantizer.encode(x)
    other = random_quantizer(16, 16, 4, seed=5)
    quantizer.load_state_dict(other.state_dict())
    assert not torch.equal(quantizer.encode(x), before)
    assert torch.equal(quantizer.encode(x), other.encode(x))


def test_tables_follow_an_optimizer_that_hides_its_steps():
    quantizer = random_quantizer(16, 16, 4).train()
    x = random_vectors(quantizer, 40)
    before = quantizer.encode(x)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.1, fused=True)
    quantizer_losses(quantizer, x, 1).total().backward()
    optimizer.step()
    stepped = random_quantizer(16, 16, 4)
    stepped.load_state_dict(quantizer.state_dict())
    assert not torch.equal(quantizer.encode(x), before)
    assert torch.equal(quantizer.encode(x), stepped.encode(x))
    assert torch.equal(quantizer.eval().encode(x), stepped.encode(x))


def test_standardisation():
    quantizer = random_quantizer(16, 256, 4)
    x = random_vectors(quantizer, 40)
    codes, decoded = quantizer.encode(x), quantizer.decode(quantizer.encode(x))
    mean, std = torch.randn(16), torch.rand(16) + 0.5
    quantizer.mean.copy_(mean)
    quantizer.std.copy_(std)
    assert (quantizer.encode(x * std + mean) == codes).float().mean() > 0.99
    torch.testing.assert_close(quantizer.decode(codes), decoded * std + mean)


@pytest.mark.parametrize(
    "surroundings",
    [torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
)
def test_codes_are_those_of_any_surroundings(surroundings):
    expected = random_quantizer(32, 256, 4)
    x = random_vectors(expected, 40).half()
    with surroundings():
        codes = random_quantizer(32, 256, 4).eval().encode(x)
    assert torch.equal(codes, expected.encode(x.float()))


def test_product_quantizer():
    quantizer = random_quantizer(16, 16, 8)
    quantizer.mean.fill_(0.5)
    merged = quantizer.product_quantizer()
    assert (merged.num_codebooks, merged.codebook_size) == (4, 256)
    codes = torch.randint(16, (30, 8))
    # Code k1 of the even and k2 of the odd codebook become k1 * 16 + k2.
    pairs = codes[:, ::2] * 16 + codes[:, 1::2]
    torch.testing.assert_close(merged.decode(pairs), quantizer.decode(codes))
    x = random_vectors(quantizer, 30)
    logits = quantizer.logits(x)
    best = logits.argmax(dim=-1)
    assert torch.equal(
        merged.logits(x).argmax(dim=-1), best[:, ::2] * 16 + best[:, 1::2]
    )


def test_bad_input():
    quantizer = random_quantizer(16, 16, 4)
    x = random_vectors(quantizer, 10)
    with pytest.raises(QuantizerError, match="dimension 15, but .* 16"):
        quantizer.encode(x[:, :15])
    for value in (float("nan"), float("inf")):
        x[7, 3] = value
        with pytest.raises(QuantizerError, match="vector 7 of 10 holds NaN"):
            quantizer.encode(x, max_frames=4)
    for value in (0, -1):
        with pytest.raises(QuantizerError, match=f"max_frames is {value}; at least 1"):
            quantizer.encode(x, max_frames=value)


@pytest.mark.parametrize("size, num", [(100, 4), (256, 3), (0, 4), (1, 4)])
def test_bad_sizes(size, num):
    with pytest.raises(QuantizerError):
        Quantizer(16, size, num)


def test_save_and_load(tmp_path):
    quantizer = random_quantizer(16, 16, 4)
    quantizer.mean.fill_(0.3)
    metadata = {"teacher": {"name": "whisper", "layer": 3}, "frame_rate": 50.0}
    quantizer.save(tmp_path / "q.pt", metadata)
    loaded = load_quantizer(tmp_path / "q.pt")
    x = random_vectors(quantizer, 40)
    assert torch.equal(loaded.encode(x), quantizer.encode(x))
    assert loaded.metadata == metadata
    assert loaded.identity == quantizer.identity
    assert os.listdir(tmp_path) == ["q.pt"]


def test_stamp_is_derived_from_the_parameters():
    first, second = random_quantizer(8, 4, 2), random_quantizer(8, 4, 2)
    assert first.identity != second.identity
    first.stamp(), second.stamp()
    assert first.identity == second.identity
    other = random_quantizer(8, 4, 2, seed=1)
    other.stamp()
    assert other.identity != first.identity


def test_foreign_and_corrupt_files(tmp_path, library_file):
    path = tmp_path / "q.pt"
    with pytest.raises(QuantizerError, match="q.pt: no such quantizer"):
        load_quantizer(path)
    path.write_bytes(library_file.read_bytes()[:3000])
    with pytest.raises(QuantizerError, match="q.pt: not a readable"):
        load_quantizer(path)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(QuantizerError, match="q.pt: neither"):
        load_quantizer(path)
    trace = tmp_path / "trace"
    path.write_bytes(pickle.dumps(Malicious(trace), protocol=2))
    with pytest.raises(QuantizerError, match="q.pt: not a readable"):
        load_quantizer(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"to_logits.bias": torch.zeros(3)}, "do not make .*to_logits.bias"),
        ({"more": torch.zeros(3)}, "do not make .*more"),
        ({"centers": torch.zeros(3)}, "do not make a quantizer of kind 'mvq'"),
        ({"centers": [1.0, 2.0]}, "do not make .*'list'"),
        ({"to_logits.bias": [1.0, 2.0]}, "do not make .*'list'"),
        ({3: torch.zeros(3)}, "do not make .*'int'"),
        ({"logits_scale": torch.tensor(float("nan"))}, "'logits_scale' holds NaN"),
        ({"mean": torch.full((16,), float("inf"))}, "'mean' holds NaN or infinity"),
        ({"std": torch.full((16,), float("nan"))}, "'std' holds NaN or infinity"),
        ({"std": torch.eye(16)[0]}, "'std' holds 0; .* above 0"),
        ({"std": torch.full((16,), -2.0)}, "'std' holds -2; .* above 0"),
        ({"id_buf": torch.full((8,), 200, dtype=torch.uint8)}, "'id_buf' holds"),
        ({"id_buf": torch.zeros(8, dtype=torch.uint8)}, "'id_buf' holds"),
    ],
)
def test_files_with_wrong_values(tmp_path, change, message):
    """Ours, and as the SPEAR authors keep them: mean and std beside the state dict."""
    ours = tmp_path / "q.pt"
    random_quantizer(16, 16, 4).save(ours)
    content = torch.load(ours, weights_only=True)
    content["state_dict"].update(change)
    torch.save(content, ours)
    state, theirs = content["state_dict"], tmp_path / "spear.pt"
    beside = {"mean": state.pop("mean"), "std": state.pop("std")}
    torch.save({"quantizer": state, **beside}, theirs)
    for path in (ours, theirs):
        with pytest.raises(QuantizerError, match=message) as error:
            load_quantizer(path)
        text = str(error.value)
        assert text.startswith(f"{path}: ") and "copy or train it again" in text
        assert "\n" not in text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": ["mvq"]}, "of kind"),
        ({"state_dict": None}, "neither"),
        ({"metadata": ["speech"]}, "metadata"),
        ({"metadata": {"teacher": "whisper"}}, "'teacher'"),
    ],
)
def test_files_with_wrong_facts(tmp_path, change, message):
    path = tmp_path / "q.pt"
    random_quantizer(16, 16, 4).save(path)
    torch.save({**torch.load(path, weights_only=True), **change}, path)
    with pytest.raises(QuantizerError, match=f"q.pt: .*{message}"):
        load_quantizer(path)


def test_library_file_round_trip(tmp_path, library_file):
    """What we write for the library has its names, shapes and types, and no others."""
    original = torch.load(library_file, weights_only=True)
    original = original.get("quantizer", original)
    quantizer = load_quantizer(library_file)
    quantizer.mean.fill_(0.3)
    quantizer.std.fill_(2.0)
    output = tmp_path / "new/l.pt"  # the folder is made
    mvq_export.main(
        ["--quantizer", str(saved(quantizer, tmp_path)), "--output", str(output)]
    )
    assert os.listdir(output.parent) == ["l.pt"]
    content = torch.load(output, weights_only=True)
    assert content.keys() == {"quantizer", "mean", "std"}
    state = content["quantizer"]
    assert {k: (v.shape, v.dtype) for k, v in state.items()} == {
        k: (v.shape, v.dtype) for k, v in original.items()
    }
    again = load_quantizer(output)
    x = random_vectors(quantizer, 40)
    assert torch.equal(again.encode(x), quantizer.encode(x))
    assert again.identity == quantizer.identity


def test_bare_library_file_cannot_standardise(tmp_path, library_file):
    quantizer = load_quantizer(library_file)
    command = ["--output", f"{tmp_path}/l.pt", "--statistics", "false", "--quantizer"]
    mvq_export.main([*command, str(saved(quantizer, tmp_path))])
    bare = torch.load(tmp_path / "l.pt", weights_only=True)
    for key, value in quantizer.state_dict().items():
        assert key in ("mean", "std") or torch.equal(bare[key], value)
    quantizer.mean.fill_(0.3)
    with pytest.raises(QuantizerError, match="with its mean and standard deviation"):
        mvq_export.main([*command, str(saved(quantizer, tmp_path))])
    ResidualQuantizer(8, 16, 2).save(tmp_path / "rvq.pt")
    with pytest.raises(QuantizerError, match="kind 'rvq' has no form"):
        mvq_export.main([*command, f"{tmp_path}/rvq.pt"])


def saved(quantizer, folder) -> Path:
    quantizer.save(folder / "ours.pt")
    return folder / "ours.pt"

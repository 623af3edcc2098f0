"""Figures of quantizers and the page that shows them."""

import json
from dataclasses import replace

import pytest
import torch
from embedding_files import TEACHER, structured_vectors, write_embeddings

from espnet2_spear.bin import mvq_report
from espnet2_spear.mvq.baselines import BaselineConfig, train_baseline
from espnet2_spear.mvq.embedding_set import EmbeddingSet
from espnet2_spear.mvq.files import load_quantizer
from espnet2_spear.mvq.quantizer import Quantizer, QuantizerError
from espnet2_spear.mvq.report import bits_per_second, evaluate
from espnet2_spear.mvq.training import MVQTrainer, MVQTrainingConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mvq") / "emb"
    return EmbeddingSet(write_embeddings(folder, [structured_vectors()]))


@pytest.fixture(scope="module")
def quantizer(data, tmp_path_factory):
    config = MVQTrainingConfig(4, True, 40, 20, 128, 0.02)
    checkpoint = tmp_path_factory.mktemp("mvq") / "checkpoint"
    return MVQTrainer(config, data, checkpoint).train()


def test_passes_of_the_search_lower_the_error(quantizer, data):
    summary = evaluate(quantizer, data)
    passes = dict(summary["held_out"]["passes"])
    assert list(passes) == [0, 1, 2, 3, 4, 5, 10, 20]
    assert passes[5] < passes[0] and passes[20] <= passes[5] * 1.001
    assert passes[5] == summary["held_out"]["relative_error"]


def test_bits_per_second(quantizer, data):
    summary = evaluate(quantizer, data)
    nominal, bound = bits_per_second(summary)
    assert nominal == 50 * 4 * 8
    assert bound == pytest.approx(50 * sum(summary["held_out"]["entropy_bits"]))
    assert bits_per_second({**summary, "frame_rate": None}) is None


def test_page_of_two(quantizer, data, tmp_path):
    config = BaselineConfig("rvq", 2, codebook_size=16, iters=5, batch_frames=256)
    other = train_baseline(config, data)
    quantizer.save(tmp_path / "mvq.pt")
    other.save(tmp_path / "rvq.pt")
    mvq_report.main(
        f"--quantizer {tmp_path}/mvq.pt --quantizer {tmp_path}/rvq.pt --embeddings "
        f"{data.source} --output_dir {tmp_path}/out".split()
    )
    page = (tmp_path / "out" / "report.md").read_text()
    content = json.loads((tmp_path / "out" / "report.json").read_text())["quantizers"]
    names = [f"mvq {quantizer.identity}", f"rvq {other.identity}"]
    assert list(content) == names
    row = next(line for line in page.splitlines() if "relative error, held out" in line)
    for name in names:
        assert f"{content[name]['held_out']['relative_error']:.4f}" in row
    assert "4 x 256 | 2 x 16" in page
    assert content[names[1]]["held_out"]["passes"][0][0] == 0
    for plot in ("error.png", "codebooks.png"):
        assert (tmp_path / "out" / plot).read_bytes().startswith(b"\x89PNG")


def test_held_out_frames_are_those_of_the_training(data, tmp_path):
    """Whatever its seed: other frames would be those that it was trained on."""
    config = BaselineConfig("kmeans", 1, codebook_size=8, iters=2, batch_frames=99)
    seeds = {}
    for seed in (0, 3):
        held_out = EmbeddingSet(data.folder, seed)
        quantizer = train_baseline(replace(config, seed=seed), held_out)
        facts = {"training": {"config": {"seed": seed}}}  # as mvq_train writes them
        quantizer.save(tmp_path / "q.pt", facts)
        mvq_report.main(
            f"--quantizer {tmp_path}/q.pt --embeddings {data.source} "
            f"--output_dir {tmp_path}/out".split()
        )
        content = json.loads((tmp_path / "out/report.json").read_text())["quantizers"]
        (found,) = content.values()
        summary = evaluate(load_quantizer(tmp_path / "q.pt"), held_out, seed)
        error = summary["held_out"]["relative_error"]
        assert found["held_out"]["relative_error"] == pytest.approx(error)
        seeds[seed] = found["config"]["seed"]
    assert seeds == {0: 0, 3: 3}


def test_page_of_one_quantizer_on_two_folders(quantizer, data, tmp_path):
    quantizer.save(tmp_path / "mvq.pt")
    other = write_embeddings(tmp_path / "other", [0.5 * structured_vectors(1000)])
    mvq_report.main(
        f"--quantizer {tmp_path}/mvq.pt --quantizer {tmp_path}/mvq.pt --embeddings "
        f"{data.source} --embeddings {other} --output_dir {tmp_path}/out".split()
    )
    content = json.loads((tmp_path / "out" / "report.json").read_text())["quantizers"]
    name = f"mvq {quantizer.identity}"
    assert list(content) == [f"{name} (1)", f"{name} (2)"]
    folders = [summary["embeddings"] for summary in content.values()]
    assert folders == [data.source, str(other)]
    errors = [s["held_out"]["relative_error"] for s in content.values()]
    assert errors[1] > 1.5 * errors[0]
    page = (tmp_path / "out" / "report.md").read_text()
    assert f"| {data.source} | {other} |" in page


@pytest.mark.parametrize(
    "made_for, dim, options, message",
    [
        ({**TEACHER, "layer": 4}, 12, "", "another teacher .* .layer 4 against 3"),
        (None, 16, "", "of 16 dimensions, .* has 12"),
        (TEACHER, 12, "--refine_iters=-1", "refine_iters is -1"),
    ],
)
def test_quantizer_that_does_not_fit(data, tmp_path, made_for, dim, options, message):
    file = tmp_path / "q.pt"
    Quantizer(dim, 16, 2).save(file, {"teacher": made_for})
    command = f"--quantizer {file} --embeddings {data.source} {options}"
    with pytest.raises(QuantizerError, match=message) as error:
        mvq_report.main([*command.split(), "--output_dir", str(tmp_path / "out")])
    assert str(file) in str(error.value) and data.source in str(error.value)


def test_unused_entries_are_counted(data):
    quantizer = Quantizer(12, 256, 2).eval()
    with torch.no_grad():
        quantizer.centers.zero_()  # every choice is as good: the search stays
        quantizer.to_logits.weight.zero_()
        quantizer.to_logits.bias.copy_(torch.arange(512.0))
    summary = evaluate(quantizer, data)
    assert summary["train"]["dead"] == [255, 255]
    assert summary["held_out"]["entropy_bits"] == [0.0, 0.0]


def test_wrong_counts(tmp_path):
    command = "--quantizer a --quantizer b --quantizer c --embeddings e --output_dir o"
    with pytest.raises(SystemExit, match="3 quantizers and 1 folders"):
        mvq_report.main(command.split())

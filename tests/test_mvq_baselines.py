"""Quantizers that MVQ is compared with: k-means, residual VQ, random projections."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from embedding_files import structured_vectors, write_embeddings

from espnet2_spear.bin import mvq_train
from espnet2_spear.errors import UserError
from espnet2_spear.mvq.baselines import (
    BaselineConfig,
    KMeansQuantizer,
    RandomProjectionQuantizer,
    ResidualQuantizer,
    train_baseline,
)
from espnet2_spear.mvq.embedding_set import EmbeddingSet
from espnet2_spear.mvq.files import load_quantizer
from espnet2_spear.mvq.quantizer import QuantizerError
from espnet2_spear.mvq.report import evaluate, relative_error
from espnet2_spear.mvq.training import MVQTrainingConfig
from espnet2_spear.mvq.training_options import parse_options

CONFIG = BaselineConfig("kmeans", codebook_size=32, iters=20, batch_frames=256)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "emb"
    return EmbeddingSet(write_embeddings(folder, [structured_vectors()]))


def error_of(quantizer, data):
    x = data.held_out_frames()
    return relative_error(
        quantizer.standardise(x), quantizer.sum_centers(quantizer.encode(x))
    )


def test_residual_codes_are_nearest_centres_one_after_another():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(12, 16, 4).eval()
    with torch.no_grad():
        quantizer.centers.normal_()
    x = torch.randn(50, 12)
    codes = quantizer.encode(x)
    left = x.clone()
    for n in range(4):
        nearest = torch.cdist(left, quantizer.centers[n]).argmin(dim=1)
        assert torch.equal(codes[:, n], nearest)
        left = left - quantizer.centers[n, nearest]
    torch.testing.assert_close(quantizer.decode(codes), x - left)
    with pytest.raises(QuantizerError, match="has no search to repeat"):
        quantizer.encode(x, refine_iters=2)


def test_kmeans_finds_separate_clusters(tmp_path):
    rng = np.random.default_rng(0)
    centers = 10 * rng.standard_normal((32, 12))
    members = rng.integers(0, 32, 4000)
    x = centers[members] + 0.1 * rng.standard_normal((4000, 12))
    data = EmbeddingSet(write_embeddings(tmp_path / "emb", [x]))
    quantizer = train_baseline(CONFIG, data)
    assert isinstance(quantizer, KMeansQuantizer)
    # One centre for each cluster leaves 1e-4; two clusters in one would leave 0.03.
    assert error_of(quantizer, data) < 1e-3


def test_every_codebook_of_rvq_helps(data):
    errors = [
        error_of(
            train_baseline(replace(CONFIG, quantizer="rvq", num_codebooks=n), data),
            data,
        )
        for n in (1, 2, 4)
    ]
    assert errors[1] < 0.7 * errors[0] and errors[2] < 0.5 * errors[1]


def test_random_projections_learn_nothing_but_the_centres(data):
    config = replace(CONFIG, quantizer="random", num_codebooks=4)
    quantizer, again = train_baseline(config, data), train_baseline(config, data)
    untrained = RandomProjectionQuantizer(12, 32, 4, seed=config.seed)
    assert torch.equal(quantizer.projections, untrained.projections)
    assert torch.equal(quantizer.codebooks, untrained.codebooks)
    assert quantizer.identity == again.identity
    assert torch.equal(quantizer.centers, again.centers)
    x = data.held_out_frames()
    standard = quantizer.standardise(x)
    codes = quantizer.encode(x)
    for n in range(4):  # nearest in angle, as BEST-RQ has it
        projected = standard @ quantizer.projections[:, 16 * n : 16 * (n + 1)]
        distance = torch.cdist(
            torch.nn.functional.normalize(projected, dim=1), quantizer.codebooks[n]
        )
        assert torch.equal(codes[:, n], distance.argmin(dim=1))
    # Least squares: no other centres do better on the training frames than these.
    assert error_of(quantizer, data) < 0.8
    other = train_baseline(replace(config, seed=1), data)
    assert not torch.equal(other.projections, quantizer.projections)


@pytest.mark.parametrize("kind, size", [("kmeans", 300), ("rvq", 16), ("random", 16)])
def test_command(data, tmp_path, kind, size):
    output = tmp_path / "exp" / "q.pt"
    mvq_train.main(
        f"--embeddings {data.source} --output {output} --quantizer {kind} --iters 5 "
        f"--codebook_size {size} --batch_frames 256".split()
        + ["--num_codebooks", "1" if kind == "kmeans" else "2"]
    )
    quantizer = load_quantizer(output)
    assert quantizer.kind == kind and quantizer.codebook_size == size
    summary = evaluate(quantizer, data)
    assert quantizer.metadata["training"]["held_out"]["relative_error"] == (
        pytest.approx(summary["held_out"]["relative_error"])
    )
    page = (tmp_path / "exp" / "report" / "report.md").read_text()
    assert kind in page and quantizer.identity in page


def test_options_are_read_before_anything_is_computed():
    words = "--quantizer kmeans --codebook_size 2000 --standardize false".split()
    expected = BaselineConfig("kmeans", 1, 2000, standardize=False)
    assert parse_options(words) == expected
    assert parse_options([]) == MVQTrainingConfig()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--quantizer kmeans --iters_phase1 9", "no option of .*kmeans"),
        ("--codebook_size 2000", "no option of --quantizer mvq"),
        ("--quantizer kmeans --num_codebooks 8", "one codebook, not 8"),
        ("--quantizer rvq --codebook_size 40000", "int16"),
        ("--quantizer vq", "quantizer: invalid choice: 'vq'"),
        ("--iter_phase1 9", "unrecognized.*--iter_phase1"),
        ("--lr much", "argument --lr: invalid"),
        ("--lr 0", "lr is 0.0"),
        ("--standardize maybe", "--standardize: invalid"),
        ("--num_codebooks 3", "num_codebooks is 3"),
        ("--quantizer rvq --seed -1", "seed is -1"),
    ],
)
def test_bad_words(words, message):
    with pytest.raises(ValueError, match=message):
        parse_options(words.split())


def test_nothing_is_written_where_something_is_wrong(data, tmp_path):
    command = f"--embeddings {data.source} --output {tmp_path}/q.pt --quantizer rvq"
    with pytest.raises(UserError, match="--lr is no option of --quantizer rvq"):
        mvq_train.main([*command.split(), "--lr", "0.1"])
    assert not (tmp_path / "q.pt").exists()
    few = write_embeddings(tmp_path / "few", [structured_vectors(30)])
    with pytest.raises(UserError, match="frames for 32 centres"):
        train_baseline(CONFIG, EmbeddingSet(few))

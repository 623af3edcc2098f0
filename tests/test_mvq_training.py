"""Training of quantizers: result, determinism, resuming, bad input."""

import json
import logging
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from embedding_files import TEACHER, structured_vectors, write_embeddings

from espnet2_spear.bin import mvq_train
from espnet2_spear.errors import UserError
from espnet2_spear.mvq.embedding_set import EmbeddingSet
from espnet2_spear.mvq.files import load_quantizer
from espnet2_spear.mvq.quantizer import Quantizer
from espnet2_spear.mvq.report import evaluate, write_report
from espnet2_spear.mvq.training import MVQTrainer, MVQTrainingConfig

CONFIG = MVQTrainingConfig(
    num_codebooks=2, iters_phase1=30, iters_phase2=20, batch_frames=128, lr=0.02
)  # 30 is no multiple of STEPS_PER_TABLES


@pytest.fixture
def arrays():
    x = structured_vectors()
    return [x[:1000].astype(np.float16), x[1000:].astype(np.float32)]


@pytest.fixture
def folder(tmp_path, arrays):
    return write_embeddings(tmp_path / "emb", arrays)


def parameters(quantizer):
    return torch.cat([p.detach().flatten() for p in quantizer.parameters()])


def test_parts_and_values(folder, arrays):
    data = EmbeddingSet(folder)
    everything = np.concatenate([a.astype(np.float32) for a in arrays])
    train = data.train_frames(np.arange(data.num_train)).numpy()
    held_out = data.held_out_frames().numpy()
    assert len(held_out) == data.num_held_out
    np.testing.assert_array_equal(
        data.held_out_frames(data.num_held_out // 2), held_out[: len(held_out) : 2]
    )
    assert 0.03 * len(everything) < len(held_out) <= 0.05 * len(everything)
    both = np.concatenate([train, held_out])
    assert len(both) == len(everything)
    order = np.lexsort(both.T), np.lexsort(everything.T)
    np.testing.assert_array_equal(both[order[0]], everything[order[1]])
    # In the order asked for, across files.
    which = np.array([2500, 3, 1500, 3])
    np.testing.assert_array_equal(data.train_frames(which), train[which])
    other = EmbeddingSet(folder, seed=1).held_out_frames()
    assert not np.array_equal(other, held_out)


def test_batches_depend_on_seed_and_step(folder):
    data = EmbeddingSet(folder)
    batch = data.train_batch(64, seed=3, step=5)
    assert torch.equal(batch, data.train_batch(64, seed=3, step=5))
    assert not torch.equal(batch, data.train_batch(64, seed=3, step=6))
    assert not torch.equal(batch, data.train_batch(64, seed=4, step=5))


def test_sample_holds_no_frame_twice(folder):
    data = EmbeddingSet(folder)
    assert len(torch.unique(data.train_sample(500, seed=0), dim=0)) == 500
    assert len(data.train_sample(10**6, seed=0)) == data.num_train


def test_training_finds_the_structure(folder, tmp_path):
    data = EmbeddingSet(folder)
    config = replace(CONFIG, iters_phase1=150, iters_phase2=50)
    trainer = MVQTrainer(config, data, tmp_path / "checkpoint")
    train = data.train_frames(np.arange(data.num_train))
    torch.testing.assert_close(trainer.quantizer.mean, train.mean(dim=0))
    torch.testing.assert_close(trainer.quantizer.std, train.std(dim=0, correction=0))
    quantizer = trainer.train()
    assert (quantizer.num_codebooks, quantizer.codebook_size) == (2, 256)
    summary = evaluate(quantizer, data, config.seed)
    # Two scalar codes, of 2 of the 12 equally important channels, would leave 0.83.
    assert summary["held_out"]["relative_error"] < 0.25
    assert summary["train"]["relative_error"] < 0.25
    assert min(summary["train"]["entropy_bits"]) > 6.5
    assert summary["train"]["dead"] == [
        256 - len(torch.unique(column))
        for column in quantizer.encode(data.train_sample(5000, config.seed)).T
    ]


def test_same_seed_same_quantizer(folder, tmp_path):
    data = EmbeddingSet(folder)
    first, again, other = (
        MVQTrainer(replace(CONFIG, seed=seed), data, tmp_path / "c").train()
        for seed in (0, 0, 1)
    )
    assert torch.equal(parameters(first), parameters(again))
    assert first.identity == again.identity != other.identity


@pytest.mark.parametrize("killed_at", [10, 30, 40, 50])
def test_killed_run_resumes_to_the_same_result(
    folder, tmp_path, monkeypatch, killed_at
):
    data = EmbeddingSet(folder)
    options = {"log_interval": 10, "save_seconds": 0.0}
    whole = MVQTrainer(CONFIG, data, tmp_path / "whole", **options)
    expected = parameters(whole.train())

    class Killed(Exception):
        pass

    def kill(line, *unused):
        if f"step {killed_at}/" in line:
            raise Killed

    checkpoint = tmp_path / "checkpoint"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(logging, "info", kill)
        MVQTrainer(CONFIG, data, checkpoint, **options).train()
    resumed = MVQTrainer(CONFIG, data, checkpoint, **options)
    assert killed_at - 4 <= resumed.step < killed_at
    assert torch.equal(parameters(resumed.train()), expected)
    assert resumed.history == whole.history
    resumed.finish()
    assert not checkpoint.exists()


def test_checkpoint_of_another_run(folder, tmp_path, arrays):
    data = EmbeddingSet(folder)
    checkpoint = tmp_path / "checkpoint"
    options = {"log_interval": 10, "save_seconds": 0.0}
    MVQTrainer(CONFIG, data, checkpoint, **options).train()
    with pytest.raises(UserError, match="checkpoint: was made with config.*remove"):
        MVQTrainer(replace(CONFIG, lr=0.1), data, checkpoint)
    other = EmbeddingSet(write_embeddings(tmp_path / "other", arrays[:1]))
    with pytest.raises(UserError, match="was made with embeddings"):
        MVQTrainer(CONFIG, other, checkpoint)
    for content in ({"weight": torch.zeros(3)}, [1, 2]):
        torch.save(content, checkpoint)
        with pytest.raises(UserError, match="checkpoint: .*another program.*remove"):
            MVQTrainer(CONFIG, data, checkpoint)
    checkpoint.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="unreadable checkpoint.*remove"):
        MVQTrainer(CONFIG, data, checkpoint)


def test_learning_rate_schedule():
    config = MVQTrainingConfig(iters_phase1=100, iters_phase2=40, lr=0.8)
    steps = (0, 24, 25, 99, 100, 109, 110, 139)
    rates = [config.learning_rate(step) for step in steps]
    assert rates == pytest.approx([0.8, 0.8, 0.4, 0.1, 0.4, 0.4, 0.2, 0.05])


@pytest.mark.parametrize(
    "option",
    [
        {"iters_phase2": 0},
        {"batch_frames": 0},
        {"num_codebooks": 12},
        {"lr": 0.0},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"seed": -1},
    ],
)
def test_bad_options(option):
    with pytest.raises(UserError, match=next(iter(option))):
        replace(CONFIG, **option)


def test_nan_in_embeddings(tmp_path, arrays):
    arrays[1][123, 4] = np.nan
    data = EmbeddingSet(write_embeddings(tmp_path / "emb", arrays))
    with pytest.raises(UserError, match=r"e\.1\.npy: frame 123 holds NaN"):
        MVQTrainer(CONFIG, data, tmp_path / "c").train()
        data.held_out_frames()


def test_constant_embeddings(tmp_path):
    folder = write_embeddings(tmp_path / "emb", [np.full((500, 8), 3.3, np.float32)])
    with pytest.raises(UserError, match="emb: all frames are equal"):
        MVQTrainer(CONFIG, EmbeddingSet(folder), tmp_path / "c")


def test_constant_channel(tmp_path, arrays, caplog):
    arrays[0][:, 3] = arrays[1][:, 3] = 7
    data = EmbeddingSet(write_embeddings(tmp_path / "emb", arrays))
    quantizer = MVQTrainer(CONFIG, data, tmp_path / "c").train()
    assert "1 of 12 channels are constant" in caplog.text
    assert quantizer.std[3] == 1 and torch.isfinite(parameters(quantizer)).all()


def test_diverging_training(folder, tmp_path):
    config = replace(CONFIG, lr=1e6)
    with pytest.raises(UserError, match="the loss is .*lower --lr"):
        MVQTrainer(config, EmbeddingSet(folder), tmp_path / "c").train()


def test_bad_embedding_files(tmp_path, arrays, folder):
    with pytest.raises(UserError, match=r"none/embeddings\.json: missing"):
        EmbeddingSet(tmp_path / "none")
    content = (folder / "e.0.npy").read_bytes()
    (folder / "e.0.npy").write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"e\.0\.npy: missing or truncated"):
        EmbeddingSet(folder)
    np.save(folder / "e.0.npy", arrays[0][:, :5])
    with pytest.raises(UserError, match=r"e\.0\.npy: holds .*5\), but"):
        EmbeddingSet(folder)
    (folder / "e.0.npy").unlink()
    with pytest.raises(UserError, match=r"e\.0\.npy: missing"):
        EmbeddingSet(folder)
    (folder / "embeddings.json").write_text('{"dim": 12}')
    with pytest.raises(UserError, match="missing or malformed.*files"):
        EmbeddingSet(folder)
    named = write_embeddings(tmp_path / "named", arrays, teacher="whisper")
    with pytest.raises(UserError, match="malformed.*teacher is no object"):
        EmbeddingSet(named)
    with pytest.raises(UserError, match="seed is -1"):
        EmbeddingSet(named, seed=-1)
    tiny = write_embeddings(tmp_path / "tiny", [arrays[0][:1]])
    with pytest.raises(UserError, match="1 frames are too few"):
        EmbeddingSet(tiny)


def test_command(folder, tmp_path):
    output = tmp_path / "exp" / "quantizer.pt"
    mvq_train.main(
        f"--embeddings {folder} --output {output} --num_codebooks 2 --iters_phase1 50 "
        "--iters_phase2 50 --batch_frames 64 --num_threads 1 --lr 0.02".split()
    )
    quantizer = load_quantizer(output)
    assert quantizer.metadata["teacher"] == TEACHER
    assert quantizer.metadata["frame_rate"] == 50.0
    report = json.loads((output.parent / "report" / "report.json").read_text())
    (summary,) = report["quantizers"].values()
    error = summary["held_out"]["relative_error"]
    assert quantizer.metadata["training"]["held_out"]["relative_error"] == error
    page = (output.parent / "report" / "report.md").read_text()
    assert f"{error:.4f}" in page and quantizer.identity in page
    for plot in ("training.png", "error.png", "codebooks.png"):
        assert plot in page
        assert (output.parent / "report" / plot).read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in output.parent.iterdir()) == [
        "quantizer.pt",
        "report",
    ]


def test_report_without_matplotlib(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    data = EmbeddingSet(folder)
    summary = evaluate(Quantizer(12, 16, 2).eval(), data)
    write_report(tmp_path / "report", {"mvq": summary})
    assert "matplotlib is missing" in caplog.text
    assert "No plots" in (tmp_path / "report" / "report.md").read_text()

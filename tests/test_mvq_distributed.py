"""Training of a quantizer by two processes over gloo."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from embedding_files import structured_vectors, write_embeddings

from espnet2_spear.bin import mvq_train
from espnet2_spear.errors import UserError
from espnet2_spear.mvq.files import load_quantizer

OPTIONS = (
    "--num_codebooks 2 --iters_phase1 30 --iters_phase2 20 --batch_frames 128 "
    "--lr 0.02 --num_threads 1"
)


def launch(command: str, ranks: int, cwd: Path) -> list[tuple[int, str]]:
    """Run mvq_train in processes that find each other as torchrun has them do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        env = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(ranks),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "espnet2_spear.bin.mvq_train", *command.split()],
                env=env,
                cwd=cwd,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    results = []
    for process in processes:
        _, errors = process.communicate(timeout=600)  # a busy machine
        results.append((process.returncode, errors))
    return results


@pytest.fixture
def folder(tmp_path):
    return write_embeddings(tmp_path / "emb", [structured_vectors()])


def test_two_processes_train_what_one_does(folder, tmp_path):
    """The same batches, so nearly the same quantizer; the losses are no plain means."""
    root = Path(__file__).resolve().parent.parent
    command = f"--embeddings {folder} --output {tmp_path}/two/q.pt {OPTIONS}"
    for code, errors in launch(command, 2, root):
        assert code == 0, errors
    mvq_train.main(
        f"--embeddings {folder} --output {tmp_path}/one/q.pt {OPTIONS}".split()
    )
    two, one = (load_quantizer(tmp_path / name / "q.pt") for name in ("two", "one"))
    errors = [q.metadata["training"]["held_out"]["relative_error"] for q in (two, one)]
    assert errors[0] == pytest.approx(errors[1], rel=0.1)
    torch.testing.assert_close(two.mean, one.mean)
    files = sorted(p.name for p in (tmp_path / "two").iterdir())
    assert files == ["q.pt", "report"]


def test_all_processes_stop_together(folder, tmp_path):
    root = Path(__file__).resolve().parent.parent
    command = f"--embeddings {folder} --output {tmp_path}/q.pt {OPTIONS} --lr 1e6"
    for code, errors in launch(command, 2, root):
        assert code != 0 and "lower --lr" in errors


def test_what_one_process_must_do(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = f"--embeddings {folder} --output {tmp_path}/q.pt --quantizer rvq"
    with pytest.raises(UserError, match="rvq trains in one process"):
        mvq_train.main(command.split())
    command = f"--wav_scp {tmp_path}/wav.scp --output {tmp_path}/q.pt"
    with pytest.raises(UserError, match="store them first"):
        mvq_train.main(command.split())

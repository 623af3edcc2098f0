"""Training of a quantizer by two processes over gloo."""

from collections.abc import Callable

import pytest
import torch
from embedding_files import structured_vectors, write_embeddings
from tiny_training import end, launch

from espnet2_spear.bin import mvq_train
from espnet2_spear.errors import UserError
from espnet2_spear.mvq import training
from espnet2_spear.mvq.files import load_quantizer
from espnet2_spear.mvq.quantizer import Quantizer

OPTIONS = (
    "--num_codebooks 2 --iters_phase1 30 --iters_phase2 20 --batch_frames 128 "
    "--lr 0.02 --num_threads 1"
)


@pytest.fixture
def folder(tmp_path):
    return write_embeddings(tmp_path / "emb", [structured_vectors()])


def test_two_processes_train_what_one_does(folder, tmp_path):
    """The same batches, so nearly the same quantizer; the losses are no plain means."""

    def keep(rank: int) -> Callable[[], None]:
        def before() -> None:
            train = training.MVQTrainer.train

            def and_save(self: training.MVQTrainer) -> Quantizer:
                quantizer = train(self)
                torch.save([*quantizer.parameters()], tmp_path / f"rank{rank}.pt")
                return quantizer

            training.MVQTrainer.train = and_save

        return before

    command = f"--embeddings {folder} --output {tmp_path}/two/q.pt {OPTIONS}"
    codes = end(launch(command.split(), tmp_path, keep, main=mvq_train.main))
    assert codes == [0, 0], (tmp_path / "log0").read_text()
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert all(map(torch.equal, *ranks))  # they shared their gradients
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
    """Where the loss of one of them is not finite."""

    def spoil(rank: int) -> Callable[[], None]:
        def before() -> None:
            losses = training.quantizer_losses

            def infinite(*args: object) -> training.QuantizerLosses:
                found = losses(*args)
                return found._replace(reconstruction=found.reconstruction * torch.inf)

            if rank == 1:
                training.quantizer_losses = infinite

        return before

    command = f"--embeddings {folder} --output {tmp_path}/q.pt {OPTIONS}"
    assert end(launch(command.split(), tmp_path, spoil, main=mvq_train.main)) == [1, 1]
    for rank in range(2):
        assert "lower --lr" in (tmp_path / f"log{rank}").read_text()


def test_what_one_process_must_do(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = f"--embeddings {folder} --output {tmp_path}/q.pt --quantizer rvq"
    with pytest.raises(UserError, match="rvq trains in one process"):
        mvq_train.main(command.split())
    command = f"--wav_scp {tmp_path}/wav.scp --output {tmp_path}/q.pt"
    with pytest.raises(UserError, match="store them first"):
        mvq_train.main(command.split())

"""What is written beside the results may fail without ending a run."""

import logging
import resource
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from espnet2.train.reporter import Reporter

from espnet2_spear.fileio.optional_output import (
    append_lines,
    read_lines,
    warn_on_oserror,
)
from espnet2_spear.spear.model import PredictedTokens, Prediction
from espnet2_spear.train.progress import Progress


@pytest.fixture
def blocked(tmp_path: Path) -> Path:
    """A folder that cannot be made, as on a full disk."""
    (tmp_path / "blocked").write_text("a file")
    return tmp_path / "blocked"


def test_only_errors_of_files_become_warnings(caplog: pytest.LogCaptureFixture) -> None:
    with warn_on_oserror("a list"):
        raise OSError(28, "No space left on device")
    assert "a list: cannot be written ([Errno 28] No space" in caplog.text
    with pytest.raises(ValueError), warn_on_oserror("a list"):
        raise ValueError("a mistake in a program")


def test_lines_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "list"
    assert read_lines(path) == []
    append_lines(path, ["a 1", "b 2"])
    append_lines(path, [])
    assert read_lines(path) == ["a 1", "b 2"]
    with open(path, "a") as file:
        file.write("half a li")
    assert read_lines(path) == ["a 1", "b 2"]
    append_lines(path, ["ä\udcff 3"])  # an id may have bytes that are no UTF-8
    assert path.read_bytes() == b"a 1\nb 2\n\xc3\xa4\xff 3\n"
    assert read_lines(path)[-1] == "ä\udcff 3"
    path.write_bytes(b"torn")
    append_lines(path, ["c"])
    assert path.read_text() == "c\n"


def test_a_full_disk_leaves_no_part(tmp_path: Path) -> None:
    """A limit on the size of files fails as a full disk does."""
    path = tmp_path / "list"
    append_lines(path, ["a 1"])
    plain = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, plain[1]))
        with pytest.raises(OSError):
            append_lines(path, ["b 2", "c 3 of many words"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, plain)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_text() == "a 1\n"
    append_lines(path, ["b 2"])
    assert read_lines(path) == ["a 1", "b 2"]


def test_pictures_and_curves(blocked: Path, caplog: pytest.LogCaptureFixture) -> None:
    reporter = Reporter()
    reporter.set_epoch(1)
    with reporter.observe("train") as sub_reporter:
        sub_reporter.register({"loss": 1.0})
        sub_reporter.next()
    with pytest.raises(OSError):
        reporter.matplotlib_plot(blocked / "images")
    codes = torch.zeros(5, 2, dtype=torch.long)
    prediction = Prediction(
        torch.zeros(10, 8),
        torch.zeros(10, dtype=torch.bool),
        {"speech": PredictedTokens(codes, codes, codes[:, 0] > 0, 50.0, 16)},
    )

    class FullWriter:
        def add_figure(self, *args: object) -> None:
            raise OSError(28, "No space left on device")

        add_scalar = add_figure

    options = SimpleNamespace(output_dir=blocked, use_matplotlib=True)
    options.use_tensorboard = options.use_wandb = False
    progress = Progress(options, SimpleNamespace(rank=0, epoch=1))
    progress.train_writer = FullWriter()
    with caplog.at_level(logging.WARNING):
        progress.show_epoch(reporter)
        progress.show_prediction(prediction, "u")
    for what in ("images", "TensorBoard's curves", "u/1ep.png", "TensorBoard's pict"):
        assert what in caplog.text
    assert len(caplog.records) == 4

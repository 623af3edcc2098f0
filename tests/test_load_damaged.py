"""Damaged checkpoints give a CheckpointError that names the file."""

import pytest
import torch

from espnet2_spear.errors import CheckpointError
from espnet2_spear.hub.load import load_model
from espnet2_spear.hub.tensors import read_tensors


@pytest.mark.parametrize(
    "name, text",
    [
        ("config.json", "{"),
        ("config.json", "[1]"),
        ("config.yaml", ""),
        ("config.yaml", "a: [1"),
        ("config.yaml", "teachers: {}"),
        ("config.yaml", "student: base"),
        ("config.yaml", "[student, student_conf]"),
        ("config.yaml", "{student: [1], student_conf: {}}"),
        ("config.yaml", "{student: base, student_conf: 5}"),
        ("config.yaml", "{student: base, student_conf: {1: 2}}"),
        ("config.yaml", "{student: base, student_conf: {num_mel_bins: .inf}}"),
        ("config.json", '{"encoder_dim": {}}'),
        ("config.json", "[" * 100_000),
        ("config.yaml", "student: \x00"),
        ("config.yaml", "\udcff"),
        ("config.yaml", "{student: base, student_conf: null}"),
        ("config.yaml", "{student: base, student_conf: {? {a: 1} : 2}}"),
    ],
)
def test_malformed_configuration(tmp_path, name, text):
    weights = "model.safetensors" if name == "config.json" else "valid.loss.best.pth"
    (tmp_path / weights).write_bytes(b"")
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_model(tmp_path)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3)])
def test_file_without_named_tensors(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth: holds a (list|Tensor)"):
        read_tensors(tmp_path / "x.pth")

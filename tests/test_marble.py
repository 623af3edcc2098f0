"""The student under MARBLE's interface, as its README documents it.

MARBLE is in no registry; what its transforms and tasks do with an encoder's output is
done here.
"""

from pathlib import Path

import pytest
import torch
from student_files import write_student

from espnet2_spear.hub.marble import SpearMarbleEncoder
from espnet2_spear.spear.checks import InputError
from espnet2_spear.zipformer.config import ConfigError


@pytest.mark.parametrize("train_mode", ["freeze", "full"])
def test_probe(tmp_path: Path, train_mode: str) -> None:
    """A task trains a head on the mean over time of some layers."""
    path = str(write_student(tmp_path))
    encoder = SpearMarbleEncoder(path=path, train_mode=train_mode).train()
    assert encoder.student.training is (train_mode == "full")
    clips = 0.1 * torch.randn(2, 1, 48000, generator=torch.Generator().manual_seed(0))
    states = encoder(clips)
    assert len(states) == encoder.NUM_LAYERS
    shape = torch.stack([states[i] for i in (0, -1)], dim=1).shape
    assert (*shape[:2], shape[3]) == (2, 2, encoder.NUM_FEATURES)
    assert abs(shape[2] - 3 * encoder.TOKEN_RATE) < 10
    head = torch.nn.Linear(encoder.NUM_FEATURES, 10)
    head(states[-1].mean(dim=1)).sum().backward()
    assert head.weight.grad.abs().sum() > 0
    trained = [p for p in encoder.student.parameters() if p.grad is not None]
    assert bool(trained) is (train_mode == "full")
    if train_mode == "freeze":
        torch.testing.assert_close(encoder(clips[:, 0])[-1], states[-1])


def test_refuses(tmp_path: Path) -> None:
    path = str(write_student(tmp_path))
    with pytest.raises(ConfigError, match="train_mode: freeze or full, not 'lora'"):
        SpearMarbleEncoder(path=path, train_mode="lora")
    with pytest.raises(InputError):
        SpearMarbleEncoder(path=path)(torch.zeros(2, 2, 16000))

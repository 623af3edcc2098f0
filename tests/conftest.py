"""Shared fixtures of the test suite."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the small reference arrays that travel with the repository."""
    return ROOT / "tests" / "data"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Full-size reference outputs beside the checkout; the test is skipped without."""
    path = ROOT.parent / "shared" / "golden"
    if not path.is_dir():
        pytest.skip("full-size reference outputs are not beside this checkout")
    return path


@pytest.fixture
def transducer_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put torchaudio's loss where ESPnet looks for warprnnt_pytorch, if it is absent.

    That package is in no registry; its compiled code is all that is replaced.
    """
    if importlib.util.find_spec("warprnnt_pytorch") is not None:
        return
    import torch
    from torchaudio.functional import rnnt_loss

    class RNNTLoss(torch.nn.Module):
        def __init__(self, blank: int, fastemit_lambda: float) -> None:
            super().__init__()
            self.blank = blank

        def forward(self, logits, targets, logit_lens, target_lens):
            lengths = logit_lens.int(), target_lens.int()
            return rnnt_loss(logits, targets.int(), *lengths, self.blank)

    module = ModuleType("warprnnt_pytorch")
    module.RNNTLoss = RNNTLoss
    monkeypatch.setitem(sys.modules, "warprnnt_pytorch", module)

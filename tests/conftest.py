"""Shared fixtures of the test suite."""

from pathlib import Path

import pytest
import torch

# Tests train in forked processes. torch.export registers a stand-in of CUDA where there
# is no GPU, and a process whose first backward pass comes after that starts autograd's
# threads, which no fork survives. So the first one comes here.
torch.ones((), requires_grad=True).backward()

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

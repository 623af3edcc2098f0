"""The multi-quantization library (PyPI, 0.1.1), which benchmarks compare with.

Neither the package nor its tests import it; it comes from a folder of its own, made by
``pip install --target FOLDER --no-deps multi-quantization==0.1.1`` and, unless the
environment has it, the same for h5py.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from espnet2_spear.mvq.files import export_library
from espnet2_spear.mvq.quantizer import Quantizer

REMEDY = "see benchmarks/README.md for how to install it, or give --peer none"


def load_peer(folder: str) -> ModuleType | None:
    """Import the library.

    Args:
        folder: that holds the package; empty if it is installed; ``none`` to do
            without it.

    Raises:
        SystemExit: it is not there.
    """
    if folder == "none":
        return None
    if folder:
        if not (Path(folder) / "multi_quantization").is_dir():
            raise SystemExit(f"{folder}: holds no multi_quantization; {REMEDY}")
        # Last, so that nothing else of the folder hides the environment's packages.
        sys.path.append(str(Path(folder).resolve()))
    try:
        import multi_quantization
    except ImportError as error:
        raise SystemExit(f"multi-quantization: {error}; {REMEDY}") from error
    return multi_quantization


def peer_quantizer(peer: ModuleType, quantizer: Quantizer):
    """The same quantizer in the library, through the file that we write for it.

    The library knows no standardisation: it is to be given standardised vectors.
    """
    dim, size, num = quantizer.dim, quantizer.codebook_size, quantizer.num_codebooks
    other = peer.Quantizer(dim, size, num)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "quantizer.pt"
        export_library(quantizer, file, with_statistics=True)
        other.load_state_dict(torch.load(file, weights_only=True)["quantizer"])
    return other.to(quantizer.centers.device).eval()


def peer_codes(other, x: Tensor, passes: int, chunk: int) -> Tensor:
    """Codes (B, N) int64 of standardised x (B, D) by the library."""
    with torch.no_grad():
        parts = [
            other.encode(part, refine_indexes_iters=passes, as_bytes=False)
            for part in x.split(chunk)
        ]
    return torch.cat(parts)


def random_quantizer(dim: int, size: int, num: int, seed: int) -> Quantizer:
    """A quantizer whose start is related to its centres, as training makes it."""
    torch.manual_seed(seed)
    quantizer = Quantizer(dim, size, num)
    with torch.no_grad():
        centers = quantizer.centers
        centers += 0.5 * centers.std() * torch.randn(centers.shape)
    quantizer.stamp()
    return quantizer.eval()


@torch.no_grad()
def noisy_vectors(quantizer: Quantizer, count: int, seed: int) -> Tensor:
    """Sums of centres with as much noise added, (count, D)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, quantizer.num_codebooks)
    codes = torch.randint(quantizer.codebook_size, shape, generator=generator)
    x = quantizer.decode(codes)
    return x + x.std() * torch.randn(x.shape, generator=generator)


def squared_errors(quantizer: Quantizer, x: Tensor, codes: Tensor) -> Tensor:
    """Squared error (B,) of every frame, float64, in the standardised space."""
    approximation = quantizer.sum_centers(codes).double()
    return (approximation - quantizer.standardise(x).double()).square().sum(dim=1)

"""Multi-codebook vector quantizer.

A vector is approximated by a sum of one centre from each of N codebooks of K centres:
additive, not residual, and without an order of the codebooks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from espnet2_spear.mvq.refine import GramTables, refine

FORMAT = "espnet2_spear.mvq.Quantizer"
SCALE_SPEED = 10.0  # makes the two scales learn ten times as fast
# Names of the multi-quantization library's state dict, which ours are too.
LIBRARY_KEYS = {
    "to_logits.weight",
    "to_logits.bias",
    "centers",
    "logits_scale",
    "centers_scale",
    "id_buf",
}


class QuantizerError(ValueError):
    """A quantizer file or an input to a quantizer is not what it must be."""


class Quantizer(nn.Module):
    """Turns vectors into N small integers and back.

    Args:
        dim: D, dimension of the vectors.
        codebook_size: K, centres per codebook, a power of two.
        num_codebooks: N, a power of two.

    Attributes:
        mean, std: (D,) standardisation applied before quantization and undone in
            :meth:`decode`; 0 and 1 unless set.
        metadata: what a file says about the quantizer beside its tensors (teacher,
            frame rate, figures of its training).

    Raises:
        QuantizerError: sizes that are no powers of two.
    """

    def __init__(self, dim: int, codebook_size: int, num_codebooks: int) -> None:
        super().__init__()
        for name, value in (
            ("codebook_size", codebook_size),
            ("num_codebooks", num_codebooks),
        ):
            if value < 1 or value & (value - 1):
                raise QuantizerError(f"{name} is {value}; it must be a power of two")
        if dim < 1 or codebook_size < 2:
            raise QuantizerError(
                f"dim {dim} or codebook_size {codebook_size} too small"
            )
        self.dim = dim
        self.codebook_size = codebook_size
        self.num_codebooks = num_codebooks
        self.to_logits = nn.Linear(dim, num_codebooks * codebook_size)
        self.centers = nn.Parameter(
            self.to_logits.weight.detach()
            .clone()
            .view(num_codebooks, codebook_size, dim)
        )
        self.logits_scale = nn.Parameter(torch.zeros(()))
        self.centers_scale = nn.Parameter(torch.zeros(()))
        # Random identity, 8 hexadecimal digits in ASCII, to tell quantizers apart.
        identity = os.urandom(4).hex().encode()
        self.register_buffer("id_buf", torch.tensor(list(identity), dtype=torch.uint8))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.metadata: dict[str, Any] = {}
        self._tables: tuple[tuple, GramTables] | None = None

    @property
    def identity(self) -> str:
        """Eight hexadecimal digits that name this quantizer."""
        return bytes(self.id_buf.tolist()).decode()

    def stamp(self) -> None:
        """Derive the identity from the parameters, so that equal ones share it."""
        digest = hashlib.sha256()
        for value in self.parameters():
            digest.update(value.detach().cpu().numpy().tobytes())
        identity = digest.hexdigest()[:8].encode()
        self.id_buf.copy_(torch.tensor(list(identity), dtype=torch.uint8))

    def standardise(self, x: Tensor) -> Tensor:
        """Subtract the mean and divide by the standard deviation; (..., D)."""
        return (x.float() - self.mean) / self.std

    def scaled_centers(self) -> Tensor:
        """Centres (N, K, D) as they are summed, for standardised vectors."""
        return self.centers * (SCALE_SPEED * self.centers_scale).exp()

    def logits(self, x: Tensor) -> Tensor:
        """Scores (B, N, K) from which the search starts, of standardised x (B, D)."""
        logits = self.to_logits(x * (SCALE_SPEED * self.logits_scale).exp())
        return logits.view(len(x), self.num_codebooks, self.codebook_size)

    def train(self, mode: bool = True) -> Quantizer:
        """As of any module; forgets what was computed from the parameters."""
        self._tables = None
        return super().train(mode)

    @torch.no_grad()
    def tables(self) -> GramTables:
        """Inner products of the centres; in eval mode they are computed once."""
        centers = (self.centers, self.centers_scale)
        # Some optimizers step without a new version, but not in eval mode.
        version = tuple(
            (p.data_ptr(), 0 if p.is_inference() else p._version) for p in centers
        )
        if self.training or self._tables is None or self._tables[0] != version:
            with torch.autocast(self.centers.device.type, enabled=False):
                self._tables = (version, GramTables(self.scaled_centers()))
        return self._tables[1]

    @staticmethod
    def default_max_frames(device: torch.device) -> int:
        """Vectors computed at once: what a CPU's caches hold, or what fills a GPU."""
        return 512 if device.type == "cpu" else 8192

    @torch.no_grad()
    def encode(
        self, x: Tensor, refine_iters: int = 5, max_frames: int | None = None
    ) -> Tensor:
        """Quantize.

        Args:
            x: (..., D) floating point; computed in float32.
            refine_iters: passes of the joint search; 0 takes each codebook's argmax.
            max_frames: vectors computed at once, which bounds the memory; by default
                as :meth:`default_max_frames` says.

        Returns:
            (..., N) int64 in 0..K-1.

        Raises:
            QuantizerError: another dimension than D, NaN or infinity.
        """
        if x.shape[-1] != self.dim:
            raise QuantizerError(
                f"input of dimension {x.shape[-1]}, but this quantizer was made for "
                f"{self.dim}: is it the quantizer of this teacher?"
            )
        flat = x.reshape(-1, self.dim)
        codes = torch.empty(
            len(flat), self.num_codebooks, dtype=torch.int64, device=x.device
        )
        tables = self.tables() if refine_iters > 0 else None
        max_frames = max_frames or self.default_max_frames(x.device)
        for start in range(0, len(flat), max_frames):
            part = self.standardise(flat[start : start + max_frames])
            if not torch.isfinite(part).all():
                bad = start + int((~torch.isfinite(part).all(dim=1)).nonzero()[0])
                raise QuantizerError(
                    f"vector {bad} of {len(flat)} holds NaN or infinity: the teacher "
                    "failed on this input"
                )
            codes[start : start + max_frames] = self._search(part, refine_iters, tables)
        return codes.view(*x.shape[:-1], self.num_codebooks)

    def _search(
        self, x: Tensor, refine_iters: int, tables: GramTables | None
    ) -> Tensor:
        """Codes (B, N) of standardised vectors (B, D); float32 under autocast too."""
        with torch.autocast(x.device.type, enabled=False):
            codes = self.logits(x).argmax(dim=-1)
            if tables is None:
                return codes
            return refine(tables, tables.linear_terms(x), codes, refine_iters)

    def decode(self, codes: Tensor) -> Tensor:
        """Approximate vectors (..., D) of codes (..., N)."""
        return self.sum_centers(codes) * self.std + self.mean

    def sum_centers(self, codes: Tensor) -> Tensor:
        """As :meth:`decode`, but standardised."""
        first = torch.arange(self.num_codebooks, device=codes.device)
        rows = codes + first * self.codebook_size
        total = F.embedding_bag(
            rows.view(-1, self.num_codebooks), self.centers.flatten(0, 1), mode="sum"
        )
        total = total * (SCALE_SPEED * self.centers_scale).exp()
        return total.view(*codes.shape[:-1], self.dim)

    def product_quantizer(self) -> Quantizer:
        """Quantizer with half the codebooks, each made of two adjacent ones.

        Code k1 of the even and k2 of the odd codebook become k1 * K + k2. It gives
        the same sums of centres.
        """
        num, size = self.num_codebooks // 2, self.codebook_size**2
        merged = Quantizer(self.dim, size, num).to(self.centers.device)

        def join(table: Tensor) -> Tensor:
            pairs = table.reshape(num, 2, self.codebook_size, -1)
            sums = pairs[:, 0].unsqueeze(2) + pairs[:, 1].unsqueeze(1)
            return sums.flatten(1, 2)  # (num, size, columns)

        with torch.no_grad():
            merged.centers.copy_(join(self.centers))
            merged.to_logits.weight.copy_(join(self.to_logits.weight).flatten(0, 1))
            merged.to_logits.bias.copy_(join(self.to_logits.bias).flatten())
            merged.logits_scale.copy_(self.logits_scale)
            merged.centers_scale.copy_(self.centers_scale)
            merged.mean.copy_(self.mean)
            merged.std.copy_(self.std)
        merged.metadata = dict(self.metadata)
        return merged

    def save(
        self, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Write tensors and metadata (primitives, lists and dicts only) to a file."""
        if metadata is not None:
            self.metadata = dict(metadata)
        state = {key: value.cpu() for key, value in self.state_dict().items()}
        temporary = f"{os.fspath(path)}.part"
        torch.save(
            {"format": FORMAT, "state_dict": state, "metadata": self.metadata},
            temporary,
        )
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Quantizer:
        """Open a file of ours or of the multi-quantization library.

        No code from the file is executed.

        Raises:
            QuantizerError: missing, corrupt or foreign file.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise QuantizerError(
                f"{path}: no such quantizer; train it with "
                "espnet2_spear.bin.mvq_train (recipe stage 4)"
            ) from None
        except Exception as error:  # whatever the unpickler meets
            raise QuantizerError(
                f"{path}: not a readable quantizer file ({type(error).__name__}); copy "
                "or train it again"
            ) from error
        metadata: dict[str, Any] = {}
        if isinstance(content, dict) and content.get("format") == FORMAT:
            metadata, content = content.get("metadata", {}), content.get("state_dict")
        if not isinstance(content, dict) or not LIBRARY_KEYS <= content.keys():
            raise QuantizerError(
                f"{path}: neither a quantizer of this package nor one of the "
                f"multi-quantization library, whose state dict has {LIBRARY_KEYS}"
            )
        num, size, dim = content["centers"].shape
        quantizer = cls(dim, size, num)
        missing = {"mean", "std"} - content.keys()
        try:
            quantizer.load_state_dict(content, strict=not missing)
        except RuntimeError as error:
            raise QuantizerError(f"{path}: {error}") from error
        quantizer.metadata = metadata
        return quantizer.eval()

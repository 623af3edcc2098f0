"""Quantizers: a vector as a sum of one centre from each of N codebooks.

    x ~ exp(10 s_c) sum_n c[n, i_n]        decoding, [3.1] of docs/method.md
    l_n = (W exp(10 s_l) x + b)_n          logits from which the search for i starts

:class:`Quantizer` is that of the library multi-quantization (MVQ), which SPEAR (arXiv
2510.25955) uses: the codebooks are added, and neither residual nor ordered. Its joint
search is :mod:`.search`, its training :mod:`.training`. :class:`AbsQuantizer` is what
it shares with the quantizers that it is compared with (:mod:`.baselines`): codes in,
sums of centres out, one file each.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from espnet2_spear.errors import UserError
from espnet2_spear.fileio.atomic import save_whole
from espnet2_spear.fileio.hashes import digest_of_parts
from espnet2_spear.mvq.search import GramTables, improve, refine
from espnet2_spear.torch_private import version

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = "espnet2_spear.mvq.Quantizer"


class QuantizerError(UserError):
    """A quantizer file or an input to a quantizer is not what it must be."""


class AbsQuantizer(nn.Module, ABC):
    """Base class of quantizers: vectors to N small integers, and to sums of N centres.

    Args:
        dim: D, dimension of the vectors.
        codebook_size: K, centres per codebook.
        num_codebooks: N.

    Attributes:
        kind: name of the class in files and options.
        default_refine_iters: passes of the search unless asked otherwise; 0 if the
            class has no search that could be repeated.
        joint_search: whether the codebooks are searched jointly.
        centers: (N, K, D).
        mean, std: (D,) standardisation applied before quantization and undone in
            :meth:`decode`; 0 and 1 unless set.
        metadata: what a file says about the quantizer beside its tensors (teacher,
            frame rate, figures of its training).

    Raises:
        QuantizerError: impossible sizes.
    """

    kind: ClassVar[str]
    default_refine_iters: ClassVar[int] = 0
    joint_search: ClassVar[bool] = True
    id_buf: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, codebook_size: int, num_codebooks: int) -> None:
        super().__init__()
        if dim < 1 or codebook_size < 2 or num_codebooks < 1:
            raise QuantizerError(
                f"dim {dim}, codebook_size {codebook_size} or num_codebooks "
                f"{num_codebooks} is too small"
            )
        self.dim = dim
        self.codebook_size = codebook_size
        self.num_codebooks = num_codebooks
        self.centers = nn.Parameter(torch.zeros(num_codebooks, codebook_size, dim))
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
        """Derive the identity from the tensors, so that equal ones share it."""
        tensors = {k: v for k, v in self.state_dict().items() if k != "id_buf"}
        digest = digest_of_parts(x.cpu().numpy().tobytes() for x in tensors.values())
        identity = digest[:8].encode()
        self.id_buf.copy_(torch.tensor(list(identity), dtype=torch.uint8))

    def standardise(self, x: Tensor) -> Tensor:
        """Subtract the mean and divide by the standard deviation; (..., D)."""
        return (x.float() - self.mean) / self.std

    def center_scale(self) -> Tensor:
        """Scalar that the centres are multiplied with before they are summed."""
        return self.centers.new_ones(())

    def scaled_centers(self) -> Tensor:
        """Centres (N, K, D) as they are summed, for standardised vectors."""
        return self.centers * self.center_scale()

    def train(self, mode: bool = True) -> Self:
        """Set the mode, as of any module; the tables of the search are made anew."""
        self._tables = None
        return super().train(mode)

    @torch.no_grad()
    def tables(self) -> GramTables:
        """Inner products of the centres; in eval mode they are computed once."""
        centers = list(self.parameters())
        # Some optimizers step without a new version, but not in eval mode.
        versions = tuple(
            (p.data_ptr(), 0 if p.is_inference() else version(p)) for p in centers
        )
        if self.training or self._tables is None or self._tables[0] != versions:
            tables = GramTables(self.scaled_centers(), self.joint_search)
            self._tables = (versions, tables)
        return self._tables[1]

    def passes(
        self,
        refine_iters: int | None,
        extra_passes: int = 0,
        max_frames: int | None = None,
    ) -> int:
        """Passes of the search, the class's own number for None.

        Raises:
            QuantizerError: options, as of :meth:`encode`, that are out of range or that
                the class does not have.
        """
        for name, value, least in (
            ("refine_iters", refine_iters, 0),
            ("extra_passes", extra_passes, 0),
            ("max_frames", max_frames, 1),
        ):
            if value is not None and value < least:
                raise QuantizerError(f"{name} is {value}; at least {least}")
            if name != "max_frames" and value and not self.default_refine_iters:
                raise QuantizerError(
                    f"{name} is {value}, but a quantizer of kind '{self.kind}' has no "
                    "search to repeat; leave the option out"
                )
        return self.default_refine_iters if refine_iters is None else refine_iters

    @torch.no_grad()
    def encode(
        self,
        x: Tensor,
        refine_iters: int | None = None,
        max_frames: int | None = None,
        extra_passes: int = 0,
    ) -> Tensor:
        """Quantize.

        Args:
            x: (..., D) floating point; computed in float32.
            refine_iters: passes of the joint search of a multi-codebook quantizer, 5
                by default; 0 takes each codebook's argmax.
            max_frames: vectors computed at once, which bounds the memory; by default
                2048 on a CPU and 8192 elsewhere, which keeps all its threads busy.
            extra_passes: passes after these that pair the codebooks of a joint search
                in other ways and never make the error larger; with any, the codes are
                not those of the multi-quantization library.

        Returns:
            (..., N) int64 in 0..K-1.

        Raises:
            QuantizerError: another dimension than D, NaN or infinity, passes of a
                quantizer that has none, or ``max_frames`` below 1.
        """
        if x.shape[-1] != self.dim:
            raise QuantizerError(
                f"input of dimension {x.shape[-1]}, but this quantizer was made for "
                f"{self.dim}: is it the quantizer of this teacher?"
            )
        passes = self.passes(refine_iters, extra_passes, max_frames)
        flat = x.reshape(-1, self.dim)
        codes = torch.empty(
            len(flat), self.num_codebooks, dtype=torch.int64, device=x.device
        )
        max_frames = max_frames or (2048 if x.device.type == "cpu" else 8192)
        for start in range(0, len(flat), max_frames):
            part = self.standardise(flat[start : start + max_frames])
            if not torch.isfinite(part).all():
                bad = start + int((~torch.isfinite(part).all(dim=1)).nonzero()[0])
                raise QuantizerError(
                    f"vector {bad} of {len(flat)} holds NaN or infinity: the teacher "
                    "failed on this input"
                )
            # In float32 under autocast, too: the search subtracts large products.
            with torch.autocast(x.device.type, enabled=False):
                found = self._search(part, passes)
                if extra_passes:
                    linear = self.tables().linear_terms(part)
                    found = improve(self.tables(), linear, found, extra_passes)
            codes[start : start + max_frames] = found
        return codes.view(*x.shape[:-1], self.num_codebooks)

    @abstractmethod
    def _search(self, x: Tensor, passes: int) -> Tensor:
        """Codes (B, N) of standardised vectors (B, D)."""

    def decode(self, codes: Tensor) -> Tensor:
        """Approximate vectors (..., D) of codes (..., N)."""
        return self.sum_centers(codes) * self.std + self.mean

    def sum_centers(self, codes: Tensor) -> Tensor:
        """Sums of centres, standardised: :meth:`decode` undoes that."""
        first = torch.arange(self.num_codebooks, device=codes.device)
        rows = codes + first * self.codebook_size
        total = F.embedding_bag(
            rows.view(-1, self.num_codebooks), self.centers.flatten(0, 1), mode="sum"
        )
        total = total * self.center_scale()
        return total.view(*codes.shape[:-1], self.dim)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> AbsQuantizer:
        """Build from a state dict, ``mean`` and ``std`` of which may be absent.

        Raises:
            RuntimeError, KeyError, ValueError: tensors that do not fit together.
        """
        num, size, dim = state["centers"].shape
        quantizer = cls(dim, size, num)
        defaults = {"mean": quantizer.mean, "std": quantizer.std}
        quantizer.load_state_dict({**defaults, **state})
        return quantizer

    def save(
        self, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Write tensors and metadata (primitives, lists and dicts only) to a file.

        :func:`espnet2_spear.mvq.files.load_quantizer` reads it.

        Raises:
            OSError: it cannot be written, such as on a full disk.
        """
        if metadata is not None:
            self.metadata = dict(metadata)
        content = {
            "format": FORMAT,
            "kind": self.kind,
            "state_dict": {k: v.cpu() for k, v in self.state_dict().items()},
            "metadata": self.metadata,
        }
        save_whole(content, path)


SCALE_SPEED = 10.0  # makes the two scales learn ten times as fast


class Quantizer(AbsQuantizer):
    """Codes found by a joint search, which starts from a linear classifier's.

    Its state dict has the names of the multi-quantization library's, and ``mean`` and
    ``std`` besides.

    Args:
        dim: D, dimension of the vectors.
        codebook_size: K, centres per codebook, a power of two.
        num_codebooks: N, a power of two.

    Raises:
        QuantizerError: sizes that are no powers of two.
    """

    kind = "mvq"
    default_refine_iters = 5

    def __init__(self, dim: int, codebook_size: int, num_codebooks: int) -> None:
        sizes = {"codebook_size": codebook_size, "num_codebooks": num_codebooks}
        for name, value in sizes.items():
            if value < 1 or value & (value - 1):
                raise QuantizerError(f"{name} is {value}; it must be a power of two")
        super().__init__(dim, codebook_size, num_codebooks)
        self.to_logits = nn.Linear(dim, num_codebooks * codebook_size)
        with torch.no_grad():
            self.centers.copy_(self.to_logits.weight.view(self.centers.shape))
        self.logits_scale = nn.Parameter(torch.zeros(()))
        self.centers_scale = nn.Parameter(torch.zeros(()))

    def center_scale(self) -> Tensor:
        """Scalar that the centres are multiplied with before they are summed."""
        return (SCALE_SPEED * self.centers_scale).exp()

    def logits(self, x: Tensor) -> Tensor:
        """Scores (B, N, K) from which the search starts, of standardised x (B, D)."""
        logits = self.to_logits(x * (SCALE_SPEED * self.logits_scale).exp())
        return logits.view(len(x), self.num_codebooks, self.codebook_size)

    def _search(self, x: Tensor, passes: int) -> Tensor:
        codes = self.logits(x).argmax(dim=-1)
        if passes == 0:
            return codes
        tables = self.tables()
        return refine(tables, tables.linear_terms(x), codes, passes)

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
        return merged

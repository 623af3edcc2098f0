"""What a student makes of one recording: fbank, layers, their likeness, tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from espnet2_spear.codes.targets import TeacherCodes
from espnet2_spear.hub.fetch import local_path
from espnet2_spear.hub.files import (
    CheckpointError,
    find_config,
    find_weights,
    read_content,
    read_tensors,
)
from espnet2_spear.hub.packed import is_packed, opened_student
from espnet2_spear.mvq.quantizer import AbsQuantizer
from espnet2_spear.spear.objective import CodebookHead
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.teachers.base import Teacher


@dataclass(frozen=True)
class Look:
    """What there is to see.

    Attributes:
        fbank: (T, num_mel_bins), 100 Hz.
        layers: of each layer its hidden states (T', C), 50 Hz.
        tokens: name -> codes (T'', N).
    """

    fbank: Tensor
    layers: list[Tensor]
    tokens: dict[str, Tensor]


class TokenSource(Protocol):
    """Something that gives tokens of a recording."""

    def tokens(self, speech: Tensor, layers: Sequence[Tensor], out: Tensor) -> Tensor:
        """Return codes (T, N) of speech (1, samples); see :func:`look`."""


class PredictedTokens:
    """The codes that a pre-trained student predicts, by one of its heads.

    Args:
        head: of one teacher.
        num_codebooks: of that teacher; a student of fewer frames predicts those of
            several of the teacher's frames at once.
        layer: from 1, which predicts them; None for the output.
    """

    def __init__(
        self, head: CodebookHead, num_codebooks: int, layer: int | None
    ) -> None:
        self.head, self.num_codebooks, self.layer = head, num_codebooks, layer

    def tokens(self, speech: Tensor, layers: Sequence[Tensor], out: Tensor) -> Tensor:
        hidden = out if self.layer is None else layers[self.layer - 1]
        codes = self.head.logits(hidden).argmax(dim=-1)
        return codes.reshape(-1, self.num_codebooks)


class TeacherTokens:
    """The codes of a teacher's embeddings by its quantizer.

    Args:
        teacher: on the student's device.
        quantizer: there, too.
    """

    def __init__(self, teacher: Teacher, quantizer: AbsQuantizer) -> None:
        self.teacher, self.quantizer = teacher, quantizer

    def tokens(self, speech: Tensor, layers: Sequence[Tensor], out: Tensor) -> Tensor:
        lengths = torch.tensor([speech.size(1)], device=speech.device)
        frames, counts = self.teacher(speech, lengths)
        return self.quantizer.encode(frames[0, : int(counts[0])])


def open_heads(path: str | Path) -> dict[str, PredictedTokens]:
    """Open the heads of a pre-trained student: teacher -> its tokens.

    Args:
        path: experiment folder, ``.pth``, packed model or hub id; none of them need
            have heads, as released checkpoints do not.

    Raises:
        CheckpointError: a configuration that cannot be read, or heads that do not fit
            it.
    """
    path = local_path(path)
    if is_packed(path):
        with opened_student(path) as file:
            return _read_heads(file)
    weights = find_weights(path)
    return _read_heads(weights) if weights.suffix == ".pth" else {}


def _read_heads(weights: Path) -> dict[str, PredictedTokens]:
    config = find_config(weights)
    state = read_tensors(weights)
    teachers = {}
    if config is not None and config.suffix == ".yaml":
        teachers = _read_teachers(config)
    found = {}
    for name, teacher in teachers.items():
        weight, bias = (state.get(f"heads.{name}.{x}") for x in ("weight", "bias"))
        if weight is None:
            continue
        size, codebooks = teacher.codebook_size, teacher.num_codebooks
        if not _fits(weight, bias, size, codebooks):
            raise CheckpointError(
                f"{weights}: heads.{name}.weight is {tuple(weight.shape)}, which does "
                f"not fit {codebooks} codebooks of {size} in {config}, or has no bias "
                "that fits it; take the config.yaml of the training that left the file"
            )
        head = CodebookHead(weight.size(1), len(weight) // size, size)
        head.load_state_dict({"weight": weight, "bias": bias})
        source = PredictedTokens(head.eval(), codebooks, teacher.layer)
        found[f"{name} (predicted)"] = source
    return found


def _fits(weight: Tensor, bias: Tensor | None, size: object, codebooks: object) -> bool:
    """Whether a head predicts whole sets of so many codebooks of so many codes."""
    for number in (size, codebooks):
        if not isinstance(number, int) or number < 1:
            return False
    whole = weight.dim() == 2 and len(weight) % (size * codebooks) == 0
    return whole and bias is not None and bias.shape == weight.shape[:1]


def _read_teachers(config: Path) -> dict[str, TeacherCodes]:
    """Return the teachers in a SpearTask's ``config.yaml``, if it names any.

    Raises:
        CheckpointError: it cannot be read, or what it calls teachers are none.
    """
    conf = read_content(config)
    teachers = (conf.get("teachers") if isinstance(conf, Mapping) else None) or {}
    if not isinstance(teachers, Mapping):
        raise CheckpointError(
            f"{config}: teachers is no table; copy the one that belongs to the weights"
        )
    try:
        return {str(k): TeacherCodes.from_dict(str(k), v) for k, v in teachers.items()}
    except ValueError as error:
        raise CheckpointError(
            f"{config}: {error}; copy the one that belongs to the weights"
        ) from None


@torch.no_grad()
def look(model: SpearEncoder, speech: Tensor, sources: dict[str, TokenSource]) -> Look:
    """Encode one recording.

    Args:
        model: in eval mode.
        speech: (samples,), 16 kHz.
        sources: of tokens.
    """
    device = next(model.parameters()).device
    speech = speech.to(device)[None]
    lengths = torch.tensor([speech.size(1)], device=device)
    fbank = model.fbank(speech, lengths)[0][0]
    out = model(speech, lengths)
    layers = [state[0].float() for state in out.hidden_states]
    final = out.encoder_out[0].float()
    tokens = {
        name: source.tokens(speech, layers, final).cpu()
        for name, source in sources.items()
    }
    return Look(fbank.cpu(), [layer.cpu() for layer in layers], tokens)


def similarity(layers: Sequence[Tensor], kind: str) -> Tensor:
    """Compare all layers with each other: (L, L), 1 on the diagonal.

    Args:
        layers: (T, C) each.
        kind: ``cosine``, the mean over frames of the cosine of two layers' frames; or
            ``cka``, the linear centred kernel alignment (Kornblith et al., 2019,
            equation 3 with linear kernels), blind to rotation and scale.

    Raises:
        ValueError: another kind.
    """
    if kind == "cosine":
        unit = torch.stack([torch.nn.functional.normalize(x, dim=1) for x in layers])
        return torch.einsum("itc,jtc->ij", unit, unit) / unit.size(1)
    if kind != "cka":
        raise ValueError(f"similarity {kind}: cosine or cka")
    centred = [(x - x.mean(dim=0)).double() for x in layers]
    norms = [(x.T @ x).norm() for x in centred]
    values = torch.stack(
        [torch.stack([(x.T @ y).square().sum() for y in centred]) for x in centred]
    )
    scale = torch.stack(norms)
    return (values / (scale[:, None] * scale).clamp(min=1e-20)).float()

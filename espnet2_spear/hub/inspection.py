"""One recording through a student: fbank, layers, tokens, and pictures of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from espnet2_spear.codes.targets import TeacherCodes, teacher_codes
from espnet2_spear.errors import CheckpointError
from espnet2_spear.hub.load import Checkpoint, read_any_checkpoint
from espnet2_spear.spear.objective import CodebookHead
from espnet2_spear.spear.student import SpearEncoder

if TYPE_CHECKING:  # pictures need matplotlib, nothing else here does
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Inspection:
    """Everything that a student computes from one recording.

    Attributes:
        fbank: (T, num_mel_bins), 100 Hz.
        layers: of each layer its hidden states (T', C), 50 Hz.
        tokens: name -> codes (T'', N).
    """

    fbank: Tensor
    layers: list[Tensor]
    tokens: dict[str, Tensor]


# Codes (T, N) of speech (1, samples), of which the student made these layers and this
# output, (T', C) each; of a teacher, see codes.tokenizer.teacher_tokens.
TokenSource = Callable[[Tensor, Sequence[Tensor], Tensor], Tensor]


def predicted_tokens(
    head: CodebookHead, num_codebooks: int, layer: int | None
) -> TokenSource:
    """The codes that a pre-trained student predicts, by one of its heads.

    Args:
        head: of one teacher.
        num_codebooks: of that teacher; a student of fewer frames predicts those of
            several of the teacher's frames at once.
        layer: from 1, which predicts them; None for the output.
    """

    def tokens(speech: Tensor, layers: Sequence[Tensor], out: Tensor) -> Tensor:
        hidden = out if layer is None else layers[layer - 1]
        codes = head.to(hidden.device).logits(hidden).argmax(dim=-1)
        return codes.reshape(-1, num_codebooks)

    return tokens


def open_heads(path: str | Path) -> dict[str, TokenSource]:
    """Open the heads of a pre-trained student: teacher -> its tokens.

    Args:
        path: experiment folder, ``.pth``, packed model or hub id; it may be without
            heads, as released checkpoints are.

    Raises:
        CheckpointError: a configuration that cannot be read, or heads that do not fit
            it.
    """
    checkpoint = read_any_checkpoint(path)
    config, weights = checkpoint.settings_file, checkpoint.file
    found = {}
    for name, teacher in _teachers(checkpoint).items():
        weight, bias = (
            checkpoint.tensors.get(f"heads.{name}.{x}") for x in ("weight", "bias")
        )
        if weight is None:
            continue
        size, codebooks = teacher.codebook_size, teacher.num_codebooks
        numbers = all(isinstance(n, int) and n > 0 for n in (size, codebooks))
        whole = numbers and weight.dim() == 2 and not len(weight) % (size * codebooks)
        if not whole or bias is None or bias.shape != weight.shape[:1]:
            raise CheckpointError(
                f"{weights}: heads.{name}.weight is {tuple(weight.shape)}, which does "
                f"not fit {codebooks} codebooks of {size} in {config}, or has no bias "
                "that fits it; take the config.yaml of the training that left the file"
            )
        head = CodebookHead(weight.size(1), len(weight) // size, size)
        head.load_state_dict({"weight": weight, "bias": bias})
        source = predicted_tokens(head.eval(), codebooks, teacher.layer)
        found[f"{name} (predicted)"] = source
    return found


def _teachers(checkpoint: Checkpoint) -> dict[str, TeacherCodes]:
    """Return the teachers in a SpearTask's ``config.yaml``, if it names any.

    Raises:
        CheckpointError: its ``teachers`` do not describe teachers.
    """
    conf, config = checkpoint.settings, checkpoint.settings_file
    teachers = (conf.get("teachers") if isinstance(conf, Mapping) else None) or {}
    if not isinstance(teachers, Mapping):
        raise CheckpointError(
            f"{config}: teachers is no table; copy the one that belongs to the weights"
        )
    try:
        return teacher_codes(teachers)
    except ValueError as error:
        raise CheckpointError(
            f"{config}: {error}; copy the one that belongs to the weights"
        ) from None


@torch.no_grad()
def inspect_recording(
    model: SpearEncoder, speech: Tensor, sources: Mapping[str, TokenSource]
) -> Inspection:
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
        name: source(speech, layers, final).cpu() for name, source in sources.items()
    }
    return Inspection(fbank.cpu(), [layer.cpu() for layer in layers], tokens)


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


# --- Pictures, for matplotlib ------------------------------------------------------


def fbank_picture(fbank: Tensor) -> Figure:
    """Log-mel energies (T, bins) at 100 Hz over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    # Bins that no FFT bin falls into stand at the floor: not what the colours are for.
    low = float(np.quantile(fbank.numpy(), 0.05))
    image = axes.imshow(
        fbank.T.numpy(),
        origin="lower",
        aspect="auto",
        extent=(0, len(fbank) / 100, 0, fbank.size(1)),
        vmin=low,
        interpolation="nearest",
    )
    axes.set(xlabel="seconds", ylabel="mel bin", title="fbank")
    figure.colorbar(image, label="log energy")
    return figure


def similarity_picture(values: Tensor, kind: str) -> Figure:
    """Picture of the similarity of layers, (L, L), with the numbers in it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values.numpy(), vmin=min(0.0, float(values.min())), vmax=1)
    number = len(values)
    axes.set_xticks(range(number), range(number))
    axes.set_yticks(range(number), range(number))
    axes.set(xlabel="layer", ylabel="layer", title=f"similarity of layers: {kind}")
    middle = (image.norm.vmin + image.norm.vmax) / 2
    for (row, column), value in np.ndenumerate(values.numpy()):
        if number <= 16:
            style = {"color": "white" if value < middle else "black", "fontsize": 7}
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", **style)
    figure.colorbar(image)
    return figure


def token_picture(tokens: Mapping[str, Tensor], seconds: float) -> Figure:
    """Codes (T, N) of each source over time, a row a codebook, a colour a code."""
    heights = [max(2, codes.size(1)) for codes in tokens.values()]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.8 + 0.28 * sum(heights)), layout="constrained")
    rows = figure.subplots(
        len(tokens), 1, squeeze=False, sharex=True, height_ratios=heights
    )
    for (axes,), (name, codes) in zip(rows, tokens.items(), strict=True):
        axes.imshow(
            codes.T.numpy(),
            aspect="auto",
            cmap="nipy_spectral",
            interpolation="nearest",
            extent=(0, seconds, codes.size(1) - 0.5, -0.5),
        )
        axes.set(ylabel="codebook", title=f"tokens: {name}")
    rows[-1][0].set_xlabel("seconds")
    return figure

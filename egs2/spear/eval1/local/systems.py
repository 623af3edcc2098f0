"""The systems that are compared, each a function from audio to layers of frames."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from espnet2_spear import load_model
from espnet2_spear.constants import SAMPLES_PER_FRAME
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.teachers import build_teacher, load_teacher_config
from espnet2_spear.zipformer.fbank import Fbank

# Audio (B, samples), lengths (B,) -> layers, each (B, frames, channels), their lengths
# (B,). Layers have one rate, 50 Hz or slower; padding changes next to nothing.
Embed = Callable[[Tensor, Tensor], tuple[list[Tensor], Tensor]]


@dataclass
class System:
    """A way to turn audio into layers of frames.

    Attributes:
        name: in tables and file names.
        title: in tables.
        identity: what its features depend on, beside the audio.
        embed: the function.
    """

    name: str
    title: str
    identity: str
    embed: Embed


def logmel(device: str) -> System:
    """Two neighbouring frames of 128 mel channels: 256 values at 50 Hz."""
    fbank = Fbank().to(device)

    def embed(speech: Tensor, lengths: Tensor) -> tuple[list[Tensor], Tensor]:
        frames, lengths = fbank(speech, lengths)
        frames = frames[:, : frames.size(1) // 2 * 2]
        return [frames.unflatten(1, (-1, 2)).flatten(2)], lengths // 2

    return System("logmel", "log-mel", "128 channels, two frames", embed)


def student(path: str, device: str, random_seed: int | None = None) -> System:
    """All layers of a student at 50 Hz, or of its network with random weights."""
    model = load_model(path)
    name, title = "student", "student"
    digest = hashlib.sha256(repr(model.config).encode())
    if random_seed is not None:
        torch.manual_seed(random_seed)
        model = SpearEncoder(model.config).eval()
        # Students of one configuration share it.
        name = f"random{random_seed}_{digest.hexdigest()[:8]}"
        title = "student, random weights"
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    model = model.eval().to(device)

    def embed(speech: Tensor, lengths: Tensor) -> tuple[list[Tensor], Tensor]:
        output = model(speech, lengths)
        return output.hidden_states, output.hidden_states_lens

    return System(name, title, digest.hexdigest(), embed)


def teacher(name: str, path: str, device: str) -> System:
    """Embeddings of a teacher, as its quantizer sees them."""
    model = build_teacher(*load_teacher_config(path)).to(device)
    identity = repr(sorted(model.describe().items()))

    def embed(speech: Tensor, lengths: Tensor) -> tuple[list[Tensor], Tensor]:
        pieces = -(-speech.size(1) // (model.max_samples or speech.size(1)))
        if pieces == 1:
            embeddings, lengths = model(speech, lengths)
            return [embeddings], lengths
        # Longer than the teacher takes, and so alone in its batch: parts of one length.
        frames = -(-speech.size(1) // (pieces * SAMPLES_PER_FRAME))
        parts = speech[:, : int(lengths)].split(frames * SAMPLES_PER_FRAME, dim=1)
        found = [model(x, torch.tensor([x.size(1)], device=x.device)) for x in parts]
        embeddings, counts = zip(*found, strict=True)
        return [torch.cat(embeddings, dim=1)], sum(counts)

    return System(f"teacher_{name}", f"teacher {name}", identity, embed)

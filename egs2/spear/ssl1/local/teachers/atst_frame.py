"""ATST-Frame (arXiv 2306.04186), an encoder of general audio, 25 Hz."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.teachers.base import Teacher, TeacherError, padding_mask
from espnet2_spear.teachers.weights import check_sha256, find_weights

HOP = 160  # samples of a mel frame
NUM_MELS = 64
PATCH = 4  # mel frames of a frame
LOWEST, HIGHEST = -79.6482, 50.6842  # dB that become -1 and 1
TOP_DB = 80.0  # what is so far below an utterance's maximum is raised to that
HEAD_DIM = 64
PREFIXES = ("model.teacher.encoder.", "teacher.encoder.", "encoder.", "")
ANCHOR = "patch_embed.patch_embed.weight"


# Names of torch's TransformerEncoderLayer in place of the released ones.
NAMES = {
    ".attn.qkv.": ".self_attn.in_proj_",
    ".attn.proj.": ".self_attn.out_proj.",
    ".mlp.fc1.": ".linear1.",
    ".mlp.fc2.": ".linear2.",
}


class _Encoder(nn.Module):
    """Patches of the mel spectrogram through the blocks."""

    def __init__(self, state: dict[str, Tensor], num_heads: int | None) -> None:
        super().__init__()
        dim = state[ANCHOR].size(0)
        depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
        hidden = state["blocks.0.mlp.fc1.weight"].size(0)
        self.patch_embed = nn.ModuleDict(
            {"patch_embed": nn.Linear(NUM_MELS * PATCH, dim)}
        )
        self.pos_embed = nn.Parameter(torch.zeros_like(state["pos_embed"]))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                *(dim, num_heads or max(1, dim // HEAD_DIM), hidden, 0.0, "gelu", 1e-6),
                batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        )
        self.norm_frame = nn.LayerNorm(dim, eps=1e-6)
        ours = {}
        for key, value in state.items():
            for old, new in NAMES.items():
                key = key.replace(old, new)
            if key not in ("mask_embed", "prompt_embed"):
                ours[key] = value
        for number in range(depth):  # checkpoints may have none
            name = f"blocks.{number}.self_attn.in_proj_bias"
            ours.setdefault(name, torch.zeros(3 * dim))
        self.load_state_dict(ours)


class AtstFrameTeacher(Teacher):
    """One layer of an ATST-Frame encoder.

    Frame t stands for samples 640 t to 640 t + 640; there are samples // 640 of them.
    Audio longer than 10 s is encoded in windows of so much, each by itself, because
    there are position embeddings for no more (the published code takes windows of
    10.01 s and loses 10 ms between two, which would shift the frames). The log-mel,
    whose floor depends on its maximum, is that of each utterance by itself.

    Args:
        weights: a released checkpoint (``atstframe_base.ckpt``), or its state dict. It
            is read without executing anything; nothing is downloaded.
        layer: k is the output of block k, counted from 1; -1, or the number of blocks,
            is the output of the model, after its last layer norm.
        num_heads: attention heads; by default those of 64 channels each.
        sha256: expected hash of the file, if it is to be checked.
    """

    name = "atst_frame"

    def __init__(
        self,
        weights: str,
        layer: int = -1,
        num_heads: int | None = None,
        sha256: str | None = None,
    ) -> None:
        super().__init__()
        from torchaudio.transforms import MelSpectrogram

        path = find_weights(weights)
        self.weights_sha256 = check_sha256(path, sha256)
        try:
            model = _Encoder(_read(path), num_heads)
        except (KeyError, IndexError, RuntimeError) as error:
            raise TeacherError(f"{path}: is no ATST-Frame encoder ({error})") from error
        blocks = len(model.blocks)
        layer = blocks if layer == -1 else layer
        if not 1 <= layer <= blocks:
            raise TeacherError(
                f"{path}: layer must be -1 or from 1 to {blocks}, not {layer}"
            )
        model.blocks = model.blocks[:layer]
        if layer < blocks:
            model.norm_frame = nn.Identity()
        self.model = model.eval()
        self.mel = MelSpectrogram(
            SAMPLE_RATE, 1024, 1024, HOP, f_min=60, f_max=7800, n_mels=NUM_MELS
        )
        self.dim = model.pos_embed.size(-1)
        self.window = model.pos_embed.size(1) - 1  # the first one is of no frame
        self.hop = HOP * PATCH
        self.min_samples = self.hop
        self.frame_rate = SAMPLE_RATE / self.hop

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Return samples // 640."""
        return lengths // self.hop

    def embed(self, speech: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Embed a batch; see :class:`Teacher`."""
        counts = self.output_lengths(lengths)
        size = int(counts.max())
        patches = speech.new_zeros(len(speech), size, NUM_MELS * PATCH)
        for row, wave, length, count in zip(
            patches, speech, lengths.tolist(), counts.tolist(), strict=True
        ):
            row[:count] = self._patches(wave[:length], count)
        x = self.model.patch_embed["patch_embed"](patches)
        frames = x.new_zeros(x.shape)
        for start in range(0, size, self.window):
            rows = (counts > start).nonzero()[:, 0]
            part = x[rows, start : start + self.window]
            end = part.size(1)
            part = part + self.model.pos_embed[:, 1 : end + 1]
            past = padding_mask(counts[rows] - start, end)
            for block in self.model.blocks:
                part = block(part, src_key_padding_mask=past)
            out = self.model.norm_frame(part)
            frames[rows, start : start + end] = out.to(frames.dtype)
        return frames, counts

    def _patches(self, wave: Tensor, count: int) -> Tensor:
        """Normalised log-mel of an utterance in patches (count, 256), mel-major."""
        # An utterance shorter than the window's half is padded to it for reflection.
        wave = F.pad(wave, (0, max(0, 513 - len(wave))))
        decibel = 10.0 * self.mel(wave.float()).clamp(min=1e-10).log10()
        decibel = decibel.clamp(min=decibel.max() - TOP_DB)
        scaled = (decibel - LOWEST) / (HIGHEST - LOWEST) * 2.0 - 1.0
        patches = scaled[:, : count * PATCH].unflatten(1, (count, PATCH))
        return patches.transpose(0, 1).flatten(1)


def _read(path: Path) -> dict[str, Tensor]:
    """The encoder's tensors, of the teacher where there is a student as well."""
    try:
        dump = torch.load(path, map_location="cpu", weights_only=True)
        state = dump.get("state_dict", dump)
        for prefix in PREFIXES:
            if prefix + ANCHOR in state:
                start = len(prefix)
                return {k[start:]: v for k, v in state.items() if k.startswith(prefix)}
    except Exception as error:  # whatever the unpickler meets
        raise TeacherError(
            f"{path}: cannot be read as tensors ({error}); where you trust the file, "
            "save its `state_dict` alone and name that file"
        ) from error
    raise TeacherError(f"{path}: holds no tensor *{ANCHOR}; it is no ATST-Frame")

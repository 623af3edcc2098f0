"""Dasheng (arXiv 2406.06992), the paper's audio teacher: [2.2] of docs/method.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.teachers.base import Teacher, TeacherError, padding_mask
from espnet2_spear.teachers.weights import check_sha256, find_weights, tensors_only

# Attention heads of the released sizes (base, 0.6B, 1.2B) by width; their checkpoints
# do not say it.
_HEADS = {768: 12, 1280: 16, 1536: 24}


class DashengTeacher(Teacher):
    """One layer of a Dasheng encoder, by the package dasheng.

    Frame t covers samples 640 t to 640 t + 640; there are samples // 640 of them. As
    the model does, audio longer than 10.08 s is embedded in windows of so much, each
    by itself. In a batch padding is masked, and the log-mel, whose floor depends on
    its maximum, is computed for each utterance by itself.

    Args:
        weights: a released checkpoint (``dasheng_base.pt``, ``dasheng_06b.pt``,
            ``dasheng_12b.pt``), a dictionary of ``model`` and ``config``. It is read
            without executing anything; nothing is downloaded.
        layer: k is the output of block k, counted from 1; -1, or the number of blocks,
            is the output of the model, after its last layer norm.
        num_heads: attention heads, for sizes that were not released.
        sha256: expected hash of the file, if it is to be checked.
    """

    def __init__(
        self,
        weights: str,
        layer: int = -1,
        num_heads: int | None = None,
        sha256: str | None = None,
    ) -> None:
        super().__init__()
        try:
            from dasheng.pretrained.pretrained import Dasheng
        except ImportError as error:
            raise TeacherError(
                f"teacher dasheng needs the package dasheng ({error}): "
                "pip install dasheng"
            ) from error
        path = find_weights(weights)
        self.weights_sha256 = check_sha256(path, sha256)
        state, config = _read(path)
        config = {**config, **_sizes(state, config, num_heads, path)}
        try:
            model = Dasheng(**config)
            model.load_state_dict(state)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise TeacherError(f"{path}: does not fit its config ({error})") from error
        if model.pooling == "token" or model.patch_embed.grid_size[0] != 1:
            raise TeacherError(
                f"{path}: is a Dasheng with a class token or several patches in "
                "frequency; only one patch a frame is supported"
            )
        blocks = len(model.blocks)
        layer = blocks if layer == -1 else layer
        if not 1 <= layer <= blocks:
            raise TeacherError(
                f"{path}: layer must be -1 or from 1 to {blocks}, not {layer}"
            )
        model.blocks = model.blocks[:layer]
        if layer < blocks:
            model.norm = torch.nn.Identity()
        self.model = model.eval()
        self.dim = model.embed_dim
        self.patch = model.patch_stride[-1]
        self.hop = model.hop_size * self.patch
        self.window = model.target_length // self.patch
        self.min_samples = self.hop
        self.frame_rate = SAMPLE_RATE / self.hop

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Return samples // 640."""
        return lengths // self.hop

    def embed(self, speech: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Embed a batch; see :class:`Teacher`."""
        model = self.model
        mels = [
            model.forward_to_spec(wave[None, :length])[0]
            for wave, length in zip(speech, lengths.tolist(), strict=True)
        ]
        # The last mel frames that fill no patch are left out, as the model does.
        counts = [mel.size(-1) // self.patch for mel in mels]
        size = max(counts)
        batch = speech.new_zeros(len(mels), *mels[0].shape[:-1], size * self.patch)
        for row, mel, count in zip(batch, mels, counts, strict=True):
            row[..., : count * self.patch] = mel[..., : count * self.patch]
        patches = model.patch_embed(batch)
        frames = speech.new_zeros(len(mels), size, self.dim)
        ends = torch.tensor(counts, device=speech.device)
        for start in range(0, size, self.window):
            rows = (ends > start).nonzero()[:, 0]
            part = patches[rows, ..., start : start + self.window]
            past = padding_mask(ends[rows] - start, part.size(-1))
            mask = past if bool(past.any()) else None
            out = model.forward_features(part, mask=mask)
            frames[rows, start : start + part.size(-1)] = out
        out_lengths = self.output_lengths(lengths)
        return frames[:, : int(out_lengths.max())], out_lengths


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with tensors_only():
            dump = torch.load(path, map_location="cpu", weights_only=True)
        return dict(dump["model"]), dict(dump["config"])
    except Exception as error:  # whatever the unpickler meets
        raise TeacherError(
            f"{path}: is not a checkpoint of Dasheng with `model` and `config`, or is "
            f"damaged ({error})"
        ) from error


def _sizes(
    state: dict[str, Tensor], config: dict[str, Any], num_heads: int | None, path: Path
) -> dict[str, int]:
    """Return width, depth and heads, which the config of a checkpoint leaves out."""
    if "patch_embed.proj.weight" not in state:
        raise TeacherError(f"{path}: holds no Dasheng (no patch_embed.proj.weight)")
    dim = state["patch_embed.proj.weight"].size(0)
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    heads = num_heads or config.get("num_heads") or _HEADS.get(dim)
    if heads is None:
        raise TeacherError(
            f"{path}: has width {dim}, which was not released; say its number of "
            "attention heads by `num_heads`"
        )
    return {"embed_dim": dim, "depth": depth, "num_heads": heads}

"""A small student written in every layout, for tests of what opens it."""

import json
import pathlib
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file

from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import ZipformerConfig

# As the published ones, but narrow: 8 heads of the published widths.
SMALL = ZipformerConfig(
    downsampling_factor=(1, 2, 4),
    num_encoder_layers=(1, 2, 1),
    feedforward_dim=(64, 96, 32),
    encoder_dim=(32,) * 3,
    encoder_unmasked_dim=(24,) * 3,
    cnn_module_kernel=(31, 15, 15),
    num_heads=(2, 3, 2),
    embed_channels=(2, 4, 8),
)
HEADS = {
    "codebook_loss_net.linear.weight": torch.zeros(4, 32),
    "codebook_loss_heads.0.bias": torch.zeros(4),
    "audio_tagging_proj.1.weight": torch.zeros(5, 32),
}
State = dict[str, torch.Tensor]


def make_student() -> SpearEncoder:
    """Random weights, always the same."""
    torch.manual_seed(0)
    return SpearEncoder(SMALL).eval()


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value.clone() for name, value in state.items()}


def write_parts(folder: Path, state: State, suffix: str) -> Path:
    """Write a checkpoint in two parts with an index, as transformers does."""
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    names = sorted(state)
    where = {}
    for part, keys in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-{part:05d}-of-00002.{suffix}"
        write = save_file if suffix == "safetensors" else torch.save
        write({k: state[k] for k in keys}, folder / file)
        where |= dict.fromkeys(keys, file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def icefall(state: State, **more: object) -> dict[str, object]:
    """All that icefall's training leaves in a checkpoint."""
    return {
        "model": {**state, **{k: v.clone() for k, v in HEADS.items()}},
        "model_avg": {k: v.double() for k, v in state.items()},
        "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.1}]},
        "grad_scaler": {"scale": 1.0},
        "sampler": {"epoch": 1, "cuts": Counter(speech=3)},
        "exp_dir": pathlib.PosixPath("zipformer/exp"),
        "best_train_loss": float("inf"),
        "subsampling_factor": 4,
        **more,
    }


def write(folder: Path, layout: str, state: State) -> Path:
    """Write the student in one of the layouts; returns what a user would name."""
    if layout == "safetensors":
        save_file(prefixed(state, "model.model."), folder / "model.safetensors")
    elif layout in ("safetensors in parts", "bin in parts"):
        suffix = layout.split()[0]
        write_parts(folder, prefixed(state, "model.model."), suffix)
    elif layout == "file of safetensors":
        save_file(prefixed(state, "model.model."), folder / "spear.safetensors")
        return folder / "spear.safetensors"
    elif layout == "bin":
        torch.save(prefixed(state, "model.model."), folder / "pytorch_model.bin")
    elif layout == "icefall":
        torch.save(icefall(state), folder / "epoch-30.pt")
    elif layout == "icefall, prefixed":
        content = icefall(state)
        content["model"] = prefixed(content["model"], "module.")
        torch.save(content, folder / "a.pt")
        torch.save(content, folder / "b.pt")
        return folder / "b.pt"
    else:
        torch.save(prefixed(state, "student."), folder / "student.pth")
    return folder

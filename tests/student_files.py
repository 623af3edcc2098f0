"""A student's experiment folder, as SpearTask leaves it, for tests of what opens it."""

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml

from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import ZipformerConfig


def write_student(folder: Path, seed: int = 1, arch: Any = "tiny") -> Path:
    """Write random weights and config.yaml; return the path of the weights."""
    torch.manual_seed(seed)
    student = SpearEncoder(ZipformerConfig.build(arch))
    state = {f"student.{k}": v for k, v in student.state_dict().items()}
    state["heads.speech.weight"] = torch.zeros(3)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "valid.loss.best.pth")
    conf = {"student": "tiny", "student_conf": student.config.to_dict()}
    (folder / "config.yaml").write_text(yaml.safe_dump(conf), encoding="utf-8")
    return folder / "valid.loss.best.pth"


def write_packed(path: Path, folder: Path) -> Path:
    """Pack an experiment folder as ESPnet's pack() would; return the archive."""
    meta = {
        "yaml_files": {"train_config": "exp/x/config.yaml"},
        "files": {"model_file": "exp/x/valid.loss.best.pth"},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("meta.yaml", yaml.safe_dump(meta))
        for name in ("config.yaml", "valid.loss.best.pth"):
            file.write(folder / name, f"exp/x/{name}")
    return path


def write_released(folder: Path, student: Path) -> Path:
    """Write the released layout of the student in an experiment folder."""
    from safetensors.torch import save_file

    folder.mkdir()
    state = torch.load(student / "valid.loss.best.pth", weights_only=True)
    named = {
        f"model.model.{k.removeprefix('student.')}": v.contiguous()
        for k, v in state.items()
        if k.startswith("student.")
    }
    save_file(named, folder / "model.safetensors")
    config = yaml.safe_load((student / "config.yaml").read_text())["student_conf"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder

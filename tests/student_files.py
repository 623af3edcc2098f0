"""A student's experiment folder, as SpearTask leaves it, for tests of what opens it."""

from pathlib import Path
from typing import Any

import torch
import yaml

from espnet2_spear.spear.encoder import SpearEncoder
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

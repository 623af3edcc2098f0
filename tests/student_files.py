"""Experiment folders of students and recognizers, for tests of what opens them."""

import argparse
import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml

from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import ZipformerConfig

TOKENS = ["<blank>", "<unk>", "<space>", *"abcdefgh", "<sos/eos>"]


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


def recognizer_on(ckpt: Path) -> dict[str, Any]:
    """Configuration of a Conformer behind frontend spear, 25 Hz."""
    small = {"output_size": 8, "attention_heads": 2, "linear_units": 8}
    return {
        "frontend": "spear",
        "frontend_conf": {"ckpt": str(ckpt), "stack": 2, "logmel": "project"},
        "encoder": "conformer",
        "encoder_conf": {
            **small,
            "input_layer": "linear",
            "num_blocks": 1,
            "rel_pos_type": "latest",
            "cnn_module_kernel": 3,
        },
    }


def write_recognizer(folder: Path, **conf: Any) -> Path:
    """Write an experiment of ESPnet's ASR task, CTC alone, with random weights."""
    from espnet2.tasks.asr import ASRTask

    settings = ASRTask.get_default_config() | {
        "token_list": TOKENS,
        "token_type": "char",
        "normalize": None,
        "decoder": None,
        "model_conf": {"ctc_weight": 1.0},
        **conf,
    }
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    torch.manual_seed(1)
    model = ASRTask.build_model(argparse.Namespace(**settings))
    torch.save(model.state_dict(), folder / "valid.acc.best.pth")
    return folder / "valid.acc.best.pth"

"""What a training would refuse, found out before data are made for it."""

import argparse
from pathlib import Path

import pytest
import torch
from espnet2.tasks.abs_task import AbsTask
from student_files import TOKENS, write_student

from espnet2_spear.errors import UserError
from espnet2_spear.fileio.explain import read_options
from espnet2_spear.tasks.asr import ASRTask
from espnet2_spear.tasks.spear import SpearTask
from espnet2_spear.tasks.training_checks import (
    _check_source,
    check_model,
    check_model_name,
)


def test_weights_of_which_espnet_would_take_none(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"encoder.x": torch.zeros(1)}, path)
    _check_source(f"{path}:encoder:encoder", path)
    _check_source(str(path), path)
    with pytest.raises(UserError, match="no tensor of it .* student.*spear_import"):
        _check_source(f"{path}:student:encoder", path)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("valid.acc.best.pth", True),
        ("valid.acc.ave.pth", True),
        ("valid.acc.ave_3best.pth", True),
        ("train.loss.ave_1best.pth", True),
        ("latest.pth", True),
        ("5epoch.pth", True),
        ("6epoch.pth", False),
        ("valid.acc.ave_10best.pth", False),  # of five epochs
        ("valid.acc.ave_2best.pth", False),
        ("valid.loss.ave.pth", False),
        ("valid.acc.pth", False),
    ],
)
def test_names_of_models(name: str, written: bool) -> None:
    args = argparse.Namespace(
        best_model_criterion=[["valid", "acc", "max"], ["train", "loss", "min"]],
        keep_nbest_models=[1, 3, 10],
        max_epoch=5,
    )
    if written:
        check_model_name(name, args)
        return
    with pytest.raises(ValueError, match=f"^{name}, to be used later, .*ave_3best.pth"):
        check_model_name(name, args)


CTC = "--normalize none --model_conf ctc_weight=1.0"
ENCODER = f"{CTC} --encoder zipformer --input_size 1 --encoder_conf arch=tiny"
FRONTEND = f"{CTC} --frontend spear --frontend_conf arch=tiny"
TEACHER = "--student tiny --teachers speech.num_codebooks=2 --teachers"
TEACHER += " speech.codebook_size=8 --teachers speech.frame_rate=50"


@pytest.mark.parametrize(
    ("task", "options", "place", "option"),
    [
        (ASRTask, ENCODER, "encoder", "encoder_conf.arch"),
        (ASRTask, FRONTEND, "frontend.upstream", "frontend_conf.arch"),
        (SpearTask, TEACHER, "student", "student, student_conf"),
    ],
)
@pytest.mark.parametrize("rate", [25, 50])
def test_weights_are_compared_with_the_network(
    tmp_path: Path,
    task: type[AbsTask],
    options: str,
    place: str,
    option: str,
    rate: int,
) -> None:
    arch = {"name": "tiny", "output_downsampling_factor": 50 // rate}
    word = f"{write_student(tmp_path, arch=arch)}:student:{place}"
    words = [*options.split(), "--output_dir", "unused", "--init_param", word]
    args = read_options(task.get_parser(), words)
    if task is ASRTask:
        args.token_list = TOKENS
    else:
        args.loss_weights = {"speech": {"speech": 1.0}}
    if rate == 50:
        check_model(task, args)
        return
    message = f"^--init_param {word}: {option}: .*factor 1 there, 2 in the weights.*; "
    with pytest.raises(ValueError, match=message):
        check_model(task, args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (f"{ENCODER} --encoder_conf depth=3", "TypeError: .*'depth'"),
        (f"{CTC} --encoder_conf num_blocks=none", "num_blocks"),
        (f"{ENCODER} --optim_conf rl=3", "TypeError: .*'rl'"),
        (f"{ENCODER} --init_param no.pth", "--init_param no.pth: no.pth is no file"),
        (f"{ENCODER} --use_wandb true", "install wandb"),
    ],
)
def test_options_that_do_not_fit(options: str, message: str, monkeypatch) -> None:
    monkeypatch.setattr(
        "espnet2_spear.tasks.training_checks.find_spec", lambda name: None
    )
    args = read_options(
        ASRTask.get_parser(), [*options.split(), "--output_dir", "unused"]
    )
    args.token_list = TOKENS
    with pytest.raises(ValueError, match=message) as caught:
        check_model(ASRTask, args)
    assert "\n" not in str(caught.value)

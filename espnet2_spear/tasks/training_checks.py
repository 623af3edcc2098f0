"""Find what a training would refuse before data are made for it."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from espnet2.layers.create_adapter import create_adapter
from espnet2.tasks.abs_task import AbsTask, scheduler_classes
from espnet2.torch_utils.load_pretrained_model import load_pretrained_model

from espnet2_spear.errors import UserError


def check_model_name(name: str, args: argparse.Namespace) -> None:
    """Refuse to wait for a file of weights that a training does not write.

    Args:
        name: of the file in the experiment's folder.
        args: of the training.

    Raises:
        ValueError: it belongs to another criterion, or to another number of epochs.
    """
    nbest = args.keep_nbest_models
    counts = [nbest] if isinstance(nbest, int) else nbest
    ends = ["best", "ave", *(f"ave_{n}best" for n in counts if n <= args.max_epoch)]
    written = [
        f"{phase}.{criterion}.{end}.pth"
        for phase, criterion, _ in args.best_model_criterion
        for end in ends
    ]
    epoch = re.fullmatch(r"(\d+)epoch\.pth", name)
    if name not in (*written, "latest.pth") and not (
        epoch and 1 <= int(epoch[1]) <= args.max_epoch
    ):
        raise ValueError(
            f"{name}, to be used later, will not be written: by best_model_criterion, "
            f"keep_nbest_models and max_epoch these will be: {', '.join(written)}, "
            f"latest.pth, 1epoch.pth to {args.max_epoch}epoch.pth; name one of them "
            "(--inference_model, --inference_asr_model)"
        )


@contextmanager
def one_kind_of_error() -> Iterator[None]:
    """Turn what classes make of options that they do not know into ValueError."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # of any class: typeguard's, torch's, an import's
        text = " ".join(str(error).split())
        raise ValueError(f"{type(error).__name__}: {text}") from error


def _check_source(word: str, path: Path) -> None:
    """Refuse weights of which ESPnet would take none, and say nothing.

    Raises:
        UserError: no tensor of the file is called as ``word`` says.
    """
    _, source, *_ = f"{word}:".split(":")
    state = torch.load(path, map_location="meta", weights_only=True)
    if source and not any(
        name.startswith(source) for name in state.get("module", state)
    ):
        raise UserError(
            f"no tensor of it is called {source}*; python -m "
            "espnet2_spear.bin.spear_import writes such a file of other layouts"
        )


def check_model(
    task: type[AbsTask], args: argparse.Namespace, files: bool = True
) -> None:
    """Build model, optimizers and schedules without numbers, and compare weights.

    Args:
        task: ESPnet's or ours.
        args: of the training; building may change them.
        files: whether weights have to be there by now.

    Raises:
        ValueError: a package or file is missing, options do not fit together, or
            weights are of another architecture.
    """
    for package in ("wandb", "deepspeed"):
        if getattr(args, f"use_{package}", False) and not find_spec(package):
            raise ValueError(f"--use_{package} true: install {package}")
    with one_kind_of_error(), warnings.catch_warnings(), torch.device("meta"):
        warnings.filterwarnings("ignore", ".*is a no-op", UserWarning)
        model = task.build_model(args)
        if getattr(args, "use_adapter", False):
            create_adapter(model, args.adapter, args.adapter_conf)
        for optimizer in task.build_optimizers(args, model):
            if args.scheduler is not None:
                scheduler_classes[args.scheduler](optimizer, **args.scheduler_conf)
    for word in args.init_param:
        path = Path(word.partition(":")[0])
        if not path.is_file():
            if files:
                raise ValueError(f"--init_param {word}: {path} is no file")
            continue
        try:
            with one_kind_of_error():
                load_pretrained_model(word, model, args.ignore_init_mismatch, "meta")
                _check_source(word, path)
        except ValueError as error:
            raise UserError(f"--init_param {word}: {error}") from error

"""From the files of a training back into the middle of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from espnet2_spear.train.checkpoint import (
    CHECKPOINT,
    PREVIOUS,
    read_checkpoint,
    read_last_good,
    repair_epoch_files,
)
from espnet2_spear.train.reporter import SpearReporter
from espnet2_spear.train.run_state import RunState
from espnet2_spear.train.step import SKIPPED

LISTS = (SKIPPED, "skipped_*.rank*.txt")  # of steps, and of utterances by rank


def prepare_folder(state: RunState, resume: bool) -> None:
    """Rank 0 removes what an earlier training left, or finds what it can resume."""
    if state.rank == 0:
        checkpoint, previous = (state.output_dir / n for n in (CHECKPOINT, PREVIOUS))
        if not resume:
            previous.unlink(missing_ok=True)
            for pattern in LISTS:
                for left in state.output_dir.glob(pattern):
                    left.unlink()
        elif previous.exists() and not checkpoint.exists():
            logging.warning(f"{checkpoint}: gone, {previous} is used instead")
            checkpoint.hardlink_to(previous)
        for left in state.output_dir.glob("*.pth.tmp"):
            left.unlink()
    if state.world_size > 1:
        torch.distributed.barrier()


def read_on_all_ranks(folder: Path, state: RunState) -> tuple[Path, dict]:
    """Read the same checkpoint everywhere: rank 0 decides which is whole.

    Raises:
        ResumeError: none is.
    """
    path, content = None, None
    if state.rank == 0:
        path, content = read_last_good(folder)
    if state.world_size > 1:
        chosen = [path]
        torch.distributed.broadcast_object_list(chosen, src=0)
        if content is None:
            path, content = chosen[0], read_checkpoint(chosen[0])
    return path, content


def restore(
    checkpoint: Path,
    content: dict[str, Any],
    state: RunState,
    model: torch.nn.Module,
    reporter: SpearReporter,
    optimizers: Sequence[torch.optim.Optimizer],
    schedulers: Sequence[Any],
    scaler: Any,
    strict: bool = True,
) -> None:
    """Put what a checkpoint holds where it belongs; mend the files of its epoch.

    Args:
        checkpoint: name of the file, for messages.
        content: what was read from it; also one of ESPnet's own trainer.
        state: of the run.
        model: not wrapped.
        reporter: of the run.
        optimizers: as many as in the checkpoint.
        schedulers: one or None for each.
        scaler: of float16 training, or None.
        strict: whether the model must have exactly the checkpoint's parameters.
    """
    model.load_state_dict(content["model"], strict=strict)
    reporter.load_state_dict(content["reporter"])
    for optimizer, saved in zip(optimizers, content["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    for scheduler, saved in zip(schedulers, content["schedulers"], strict=True):
        if scheduler is not None:
            scheduler.load_state_dict(saved)
    if scaler is not None and content.get("scaler") is not None:
        scaler.load_state_dict(content["scaler"])
    own = content.get("spear")
    state.epoch = reporter.get_epoch() + 1
    if own is None:
        logging.warning(
            f"{checkpoint}: of ESPnet's own trainer, without running average and "
            "count of steps, which begin anew"
        )
    else:
        state.load_state_dict(own)
        reporter.interrupted = own.get("interrupted")
    if state.position == 0 and state.rank == 0 and state.epoch > 1:
        epoch = state.epoch - 1
        best = [
            f"{phase}.{name}"
            for phase, name, mode in state.best_model_criterion
            if reporter.has(phase, name)
            and reporter.get_best_epoch(phase, name, mode) == epoch
        ]
        repair_epoch_files(state.output_dir, epoch, content["model"], best)
    logging.info(
        f"{checkpoint}: the training goes on after {state.position} batches of "
        f"epoch {state.epoch}"
    )

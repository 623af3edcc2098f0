"""Checkpoints: what they hold, how they are written, and how a training goes on.

``checkpoint.pth`` holds what ESPnet's trainer puts there (model, reporter, optimizers,
schedulers, scaler) and, under ``spear``, what a run needs to go on as if nothing had
happened: the batches of the epoch that are done, the running average, the statistics so
far and what modules of each rank remember in plain numbers. Random numbers are not in
it: every step seeds them anew.

A checkpoint is whole or not there. The one before it stays as ``checkpoint.prev.pth``
for the case that the newest is damaged. The files of an epoch (``Nepoch.pth``, links,
the running average) are written before its checkpoint: a run that is killed in between
comes back to the steps before, and writes them again.
"""

from __future__ import annotations

import copy
import datetime
import logging
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from espnet2.train.reporter import Reporter, SubReporter, WeightedAverage
from torch import nn

from espnet2_spear.fileio.atomic import save_whole
from espnet2_spear.fileio.explain import some
from espnet2_spear.train.average import FOLDER, RunningAverage
from espnet2_spear.zipformer.regularizers import Whiten
from espnet2_spear.zipformer.schedule import BatchCountState

CHECKPOINT = "checkpoint.pth"
PREVIOUS = "checkpoint.prev.pth"
SKIPPED = "skipped_steps.jsonl"
LISTS = (SKIPPED, "skipped_*.rank*.txt")  # of steps, and of utterances by rank
_PARTS = ("model", "reporter", "optimizers", "schedulers", "spear")
_COUNTERS = ("epoch", "position", "steps", "samples", "skipped", "any_valid")


class ResumeError(RuntimeError):
    """No checkpoint of an experiment can be read, or it does not fit the options."""


@dataclass
class RunState:
    """A training between two of its steps.

    Attributes:
        output_dir: the experiment.
        model: not wrapped.
        optimizer: as ESPnet built it.
        scheduler: that steps with it, or None.
        average: running average of the model.
        scaler: of float16 training, or None.
        accum_grad: batches per step.
        reporter: statistics of the epochs.
        rank: of this process.
        world_size: number of ranks.
        epoch: that is being trained, from 1.
        position: batches of the epoch that are done.
        steps: optimizer steps of the whole training, skipped ones included.
        samples: of audio (16 kHz) seen so far, by all ranks, without padding.
        skipped: steps of the epoch that were skipped for numbers that are not finite.
        any_valid: whether at least one step of the epoch updated the parameters.
        interrupted: statistics of the unfinished epoch, as read from a checkpoint.
    """

    output_dir: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    average: RunningAverage
    scaler: torch.amp.GradScaler | None = None
    accum_grad: int = 1
    reporter: Reporter = field(default_factory=Reporter)
    rank: int = 0
    world_size: int = 1
    epoch: int = 1
    position: int = 0
    steps: int = 0
    samples: float = 0.0
    skipped: int = 0
    any_valid: bool = False
    interrupted: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        # Of optimizer and scheduler before their first step: what their options say.
        self._options: dict[str, Any] = {
            f"{name}{number if number else ''}": value
            for number, group in enumerate(self.optimizer.state_dict()["param_groups"])
            for name, value in group.items()
            if name != "params"
        }
        if self.scheduler is not None:
            self._options |= copy.deepcopy(self.scheduler.state_dict())

    def begin_next_epoch(self) -> None:
        """Count batches and skipped steps anew."""
        self.epoch += 1
        self.position, self.skipped, self.any_valid = 0, 0, False

    def save(self, statistics: SubReporter | None = None) -> None:
        """Write a checkpoint; call it on all ranks.

        Args:
            statistics: of the epoch that is being trained, in the middle of one.

        Raises:
            CheckpointWriteError: such as on a full disk.
        """
        ranks = [memory := _memory(self.model)]
        if self.world_size > 1:
            ranks = [{} for _ in range(self.world_size)]
            torch.distributed.all_gather_object(ranks, memory)
        if self.rank != 0:
            return
        own = {
            "version": 1,
            **{name: getattr(self, name) for name in _COUNTERS},
            "accum_grad": self.accum_grad,
            "options": self._options,
            "ranks": ranks,
            "average": self.average.state_dict(),
            "interrupted": statistics and statistics_state(statistics),
        }
        before = {e: s for e, s in self.reporter.stats.items() if e < self.epoch}
        content = {
            "model": self.model.state_dict(),
            "reporter": {"stats": _primitive(before), "epoch": self.epoch - 1},
            "optimizers": [self.optimizer.state_dict()],
            "schedulers": [self.scheduler and self.scheduler.state_dict()],
            "scaler": self.scaler and self.scaler.state_dict(),
            "spear": own,
        }
        path = self.output_dir / CHECKPOINT
        save_whole(content, path, keep_as=path.with_name(PREVIOUS))
        logging.info(
            f"{path}: written after {self.position} batches of epoch {self.epoch}"
        )

    def load(self, content: dict[str, Any], path: Path) -> None:
        """Go on from a checkpoint.

        Args:
            content: what was read.
            path: the file's name, for messages.

        Raises:
            ResumeError: optimizer or scheduler have other options. What they are is in
                their state: other options would have no effect.
        """
        own = content["spear"]
        before = own.get("options", {})
        differ = [
            f"{name} was {before[name]}, is {now}"
            for name, now in self._options.items()
            if name in before and not _alike(before[name], now)
        ]
        if differ:
            raise ResumeError(
                f"{path}: optimizer or scheduler have other options ({some(differ)}), "
                "which would have no effect. Give the former to go on; for others "
                "begin in another --output_dir with --init_param of the last Nepoch.pth"
            )
        self.model.load_state_dict(content["model"])
        self.reporter.load_state_dict(content["reporter"])
        self.optimizer.load_state_dict(content["optimizers"][0])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(content["schedulers"][0])
        if self.scaler is not None and content["scaler"] is not None:
            self.scaler.load_state_dict(content["scaler"])
        for name in _COUNTERS:
            setattr(self, name, own[name])
        if self.rank == 0:  # the others do not average
            self.average.load_state_dict(own["average"])
        self.interrupted = own["interrupted"]
        for what, then, now in (
            ("processes", len(own["ranks"]), self.world_size),
            ("batches per step (accum_grad)", own["accum_grad"], self.accum_grad),
        ):
            if then != now:
                logging.warning(
                    f"the interrupted run had {then} {what}, this one has {now}: it "
                    "goes on from there, but not with the same numbers as without "
                    "the interruption"
                )
        _remember(self.model, own["ranks"][self.rank % len(own["ranks"])])
        logging.info(
            f"{path}: the training goes on after {self.position} batches of "
            f"epoch {self.epoch}"
        )


def _alike(then: Any, now: Any) -> bool:
    """Whether two options are the same, but for rounding and kinds of lists."""
    if isinstance(now, list | tuple) and isinstance(then, list | tuple):
        return len(then) == len(now) and all(map(_alike, then, now))
    if isinstance(now, int | float) and isinstance(then, int | float):
        return math.isclose(then, now, rel_tol=1e-4)
    return then == now


def prepare_folder(state: RunState, resume: bool) -> bool:
    """Rank 0 puts aside what an earlier training left, or finds what it can resume.

    Returns:
        whether there is a checkpoint to go on from.
    """
    checkpoint, previous = (state.output_dir / n for n in (CHECKPOINT, PREVIOUS))
    if state.rank == 0:
        if not resume:
            _put_aside(state.output_dir)
            for pattern in LISTS:
                for left in state.output_dir.glob(pattern):
                    left.unlink()
        folders = (state.output_dir, state.output_dir / FOLDER)
        for pattern in (".*.part", "*.pth.tmp"):  # of processes that were killed
            for left in (p for folder in folders for p in folder.glob(pattern)):
                left.unlink()
    if state.world_size > 1:
        torch.distributed.barrier()
    return resume and (checkpoint.exists() or previous.exists())


def _put_aside(folder: Path) -> None:
    """Move what a training could be resumed from, or averaged with, into ``before/``.

    It replaces what an earlier call of this moved there.
    """
    left = [folder / name for name in (CHECKPOINT, PREVIOUS, FOLDER)]
    if not any(path.exists() for path in left):
        return
    before = folder / "before"
    shutil.rmtree(before, ignore_errors=True)
    before.mkdir()
    for path in left:
        if path.exists():
            path.rename(before / path.name)
    logging.warning(
        f"{folder}: begins anew (--resume false); checkpoint and running averages of "
        f"the training before are in {before}"
    )


def resume_from_folder(state: RunState) -> None:
    """Go on from the last checkpoint that is whole; rank 0 decides which that is.

    Raises:
        ResumeError: none is.
    """
    path, content = None, None
    if state.rank == 0:
        path, content = read_last_good(state.output_dir)
    if state.world_size > 1:
        chosen = [path]
        torch.distributed.broadcast_object_list(chosen, src=0)
        path = chosen[0]
    assert path is not None
    state.load(content or read_checkpoint(path), path)


def read_last_good(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Read the newest checkpoint of an experiment that is whole.

    Raises:
        ResumeError: none is; the message says what is wrong with each.
    """
    problems = []
    for name in (CHECKPOINT, PREVIOUS):
        try:
            content = read_checkpoint(folder / name)
        except ResumeError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            logging.warning(f"{problem}: the previous checkpoint is used instead")
        return folder / name, content
    raise ResumeError(
        "; ".join(problems) + ". Restore one of them, or start anew into another "
        "--output_dir (--init_param takes the last Nepoch.pth)"
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read one file to the CPU, without executing anything that it holds.

    Raises:
        ResumeError: not there, damaged, or something else than a checkpoint.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever damaged bytes make of the reader
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ResumeError(f"{path}: cannot be read ({reason[0]})") from error
    missing = [k for k in _PARTS if not isinstance(content, dict) or k not in content]
    if missing:
        raise ResumeError(f"{path}: no checkpoint of a training, lacks {missing}")
    return content


# --- What modules and reporters remember ----------------------------------------------


def _memory(model: nn.Module) -> dict[str, float]:
    """What modules carry from step to step in plain numbers, by module name."""
    memory = {}
    for name, module in model.named_modules():
        if isinstance(module, BatchCountState) and module.count is not None:
            # As a tensor it is float32, and that of rank 0.
            memory[name] = module.count.value
        elif isinstance(module, Whiten):
            memory[name] = module.prob
    return memory


def _remember(model: nn.Module, memory: dict[str, float]) -> None:
    for name, module in model.named_modules():
        if name in memory:
            if isinstance(module, BatchCountState):
                module.count.value = memory[name]
            elif isinstance(module, Whiten):
                module.prob = memory[name]


def statistics_state(reporter: SubReporter) -> dict[str, Any]:
    """Statistics that an epoch's reporter has collected, weighted, as tensors."""
    return {
        "count": reporter.count,
        "total_count": reporter.total_count,
        "seconds": time.perf_counter() - reporter.start_time,
        "stats": {
            name: torch.tensor(
                [(v.value, v.weight) for v in values], dtype=torch.float64
            )
            for name, values in reporter.stats.items()
        },
    }


def restore_statistics(reporter: SubReporter, state: dict[str, Any]) -> None:
    """Put :func:`statistics_state` back into a new reporter of the same epoch."""
    reporter.count = state["count"]
    reporter.total_count = state["total_count"]
    reporter.start_time -= state["seconds"]
    for name, values in state["stats"].items():
        reporter.stats[name] = [WeightedAverage(*pair) for pair in values.tolist()]


def _primitive(value: Any) -> Any:
    """Replace NumPy scalars and time spans by what ``weights_only`` loading accepts.

    As ESPnet 202611 does it; 202511 writes them as they are.
    """
    if isinstance(value, Mapping):
        return {k: _primitive(v) for k, v in value.items()}
    if isinstance(value, datetime.timedelta):
        return {"__timedelta_seconds__": value.total_seconds()}
    if isinstance(value, np.generic):
        return value.item()
    return value

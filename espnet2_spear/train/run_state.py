"""Where a training is: everything that a resumed run needs and ESPnet does not keep."""

from __future__ import annotations

import logging
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from espnet2.train.reporter import SubReporter
from torch import nn

from espnet2_spear.train.checkpoint import (
    CHECKPOINT,
    PREVIOUS,
    CheckpointWriteError,
    ResumeError,
    atomic_save,
)
from espnet2_spear.train.interruption import StopRequest
from espnet2_spear.train.model_average import RunningAverage
from espnet2_spear.train.reporter import SpearReporter, statistics_state
from espnet2_spear.zipformer.regularizers import Whiten
from espnet2_spear.zipformer.schedule import BatchCountState

VERSION = 1
_COUNTERS = ("epoch", "position", "steps", "samples", "skipped", "any_valid")


@dataclass
class RunState:
    """A training between two of its steps.

    Attributes:
        output_dir: the experiment.
        model: not wrapped.
        optimizers: as ESPnet built them.
        schedulers: one or None for each optimizer.
        average: running average of the model.
        accum_grad: batches per step.
        best_model_criterion: ESPnet's option.
        rank: of this process.
        world_size: number of ranks.
        epoch: that ``position`` counts in.
        position: batches of the epoch that are done.
        steps: optimizer steps of the whole training, skipped ones included.
        samples: of audio (16 kHz) seen so far, by all ranks, without padding.
        skipped: steps of the epoch that were skipped for numbers that are not finite.
        any_valid: whether any step of the epoch was not.
        skips: utterances that this rank could not read so far.
        laid_out: whether the layout of gradients over several ranks is that of all
            steps (:func:`fix_gradient_layout`).
        ranks: what modules remember in each rank, beside their tensors.
    """

    output_dir: Path
    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    schedulers: Sequence[Any]
    average: RunningAverage
    accum_grad: int
    best_model_criterion: Sequence[Sequence[str]] = ()
    rank: int = 0
    world_size: int = 1
    epoch: int = 1
    position: int = 0
    steps: int = 0
    samples: float = 0.0
    skipped: int = 0
    any_valid: bool = False
    skips: Sized = ()
    laid_out: bool = False
    ranks: list[dict[str, float]] = field(default_factory=list)
    stop: StopRequest = field(default_factory=StopRequest)
    reporter: SpearReporter | None = None
    scaler: Any = None
    train_reporter: SubReporter | None = None
    summary_writer: Any = None

    def begin_epoch(self, epoch: int) -> None:
        """Start counting, unless the epoch was begun before an interruption."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0
            self.skipped, self.any_valid = 0, False

    def start_of(self, epoch: int) -> int:
        """Batches of an epoch that are done."""
        return self.position if epoch == self.epoch else 0

    def gather_ranks(self) -> None:
        """Collect what modules remember, on all ranks at once."""
        mine = _memory(self.model)
        self.ranks = [mine]
        if self.world_size > 1:
            self.ranks = [{} for _ in range(self.world_size)]
            torch.distributed.all_gather_object(self.ranks, mine)

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors, all of them; :meth:`gather_ranks` comes before."""
        return {
            "version": VERSION,
            **{name: getattr(self, name) for name in _COUNTERS},
            "accum_grad": self.accum_grad,
            "ranks": self.ranks,
            "average": self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        if state["version"] > VERSION:
            raise ResumeError(
                f"{self.output_dir}: the checkpoint is of a newer espnet2-spear "
                f"(state {state['version']}, known is {VERSION}); update the package"
            )
        for name in _COUNTERS:
            setattr(self, name, state[name])
        self.average.load_state_dict(state["average"])
        for what, then, now in (
            ("processes", len(state["ranks"]), self.world_size),
            ("batches per step (accum_grad)", state["accum_grad"], self.accum_grad),
        ):
            if then != now:
                logging.warning(
                    f"the interrupted run had {then} {what}, this one has {now}: it "
                    "goes on from there, but not with the same numbers as without "
                    "the interruption"
                )
        if state["ranks"]:
            _remember(self.model, state["ranks"][self.rank % len(state["ranks"])])

    def complete(self, path: Path, content: Any) -> Any:
        """Add this state to the checkpoint that ESPnet writes after an epoch."""
        if path.name != CHECKPOINT or "reporter" not in content:
            return content
        state = self.state_dict()
        state.update(epoch=self.epoch + 1, position=0, skipped=0, any_valid=False)
        return {**content, "spear": state}

    def save(self) -> None:
        """Write a checkpoint in the middle of an epoch; call it on all ranks.

        ESPnet's own trainer can resume from it, too: from the epoch's beginning.
        A disk that is full costs this checkpoint, not the training.
        """
        self.gather_ranks()
        if self.rank != 0:
            return
        content = {
            "model": self.model.state_dict(),
            "reporter": self.reporter.state_before(self.epoch),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "schedulers": [s and s.state_dict() for s in self.schedulers],
            "scaler": self.scaler and self.scaler.state_dict(),
            "spear": {
                **self.state_dict(),
                "interrupted": statistics_state(self.train_reporter),
            },
        }
        path = self.output_dir / CHECKPOINT
        try:
            atomic_save(content, path, keep_as=path.with_name(PREVIOUS))
        except CheckpointWriteError as error:
            logging.error(f"the training goes on without this checkpoint: {error}")
        else:
            logging.info(
                f"{path}: written after {self.position} batches of epoch {self.epoch}"
            )


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

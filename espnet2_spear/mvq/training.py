"""Two-phase training of a quantizer.

Phase 1 trains twice as many codebooks of 16 centres. Neighbours are then merged to
codebooks of 256 centres, all sums of two, and phase 2 trains those.

If torch.distributed is initialised, every step's batch is divided among the ranks and
gradients are averaged, so that all hold the same quantizer; the first one alone writes.
"""

from __future__ import annotations

import io
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from espnet2_spear.fileio.atomic import write_atomically
from espnet2_spear.mvq.embeddings import TrainingFrames
from espnet2_spear.mvq.gram import GramTables
from espnet2_spear.mvq.losses import QuantizerLosses, quantizer_losses
from espnet2_spear.mvq.quantizer import Quantizer
from espnet2_spear.mvq.statistics import channel_statistics

PHASE_ONE_SIZE = 16
# The inner products of all centres cost more than the rest of a step of phase 2. In so
# few steps they change by little, and the search for codes may use those of before.
STEPS_PER_TABLES = 4


class TrainingError(ValueError):
    """Training cannot start or go on."""


def check_seed(seed: int) -> None:
    """Raise TrainingError for seeds that NumPy or scikit-learn would refuse."""
    if not 0 <= seed < 2**31:
        raise TrainingError(f"seed is {seed}; from 0 to {2**31 - 1}")


@dataclass(frozen=True)
class MVQTrainingConfig:
    """What the trained quantizer depends on, beside its embeddings.

    Attributes:
        num_codebooks: codebooks of 256 centres, a power of two: bytes per frame.
        standardize: train on, and keep with the quantizer, per-channel mean and
            standard deviation.
        iters_phase1: steps with 2 * num_codebooks codebooks of 16 centres.
        iters_phase2: steps with codebooks of 256 centres.
        batch_frames: frames per step.
        lr: of Adam in phase 1; half of it in phase 2; halved every quarter of a phase.
        seed: of the initial values and the order of frames.

    Raises:
        TrainingError: values out of range.
    """

    num_codebooks: int = 16
    standardize: bool = True
    iters_phase1: int = 10_000
    iters_phase2: int = 10_000
    batch_frames: int = 1024
    lr: float = 0.005
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iters_phase1", "iters_phase2", "batch_frames"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}; at least 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise TrainingError(f"lr is {self.lr}; a number above 0, such as 0.005")
        check_seed(self.seed)
        if self.num_codebooks not in (1, 2, 4, 8, 16, 32):
            raise TrainingError(
                f"num_codebooks is {self.num_codebooks}; choose 1, 2, 4, 8, 16 or 32"
            )

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, counted over both phases."""
        if step < self.iters_phase1:
            return self.lr * 0.5 ** (4 * step // self.iters_phase1)
        step -= self.iters_phase1
        return 0.5 * self.lr * 0.5 ** (4 * step // self.iters_phase2)

    @property
    def total_iters(self) -> int:
        """Steps of both phases."""
        return self.iters_phase1 + self.iters_phase2


class MVQTrainer:
    """Trains a quantizer, from the last checkpoint if there is one.

    Args:
        config: see there.
        data: embeddings.
        checkpoint: file that a killed run resumes from; removed at the end by
            :meth:`finish`.
        device: to train on.
        log_interval: steps between entries of the history.
        save_seconds: time between checkpoints, at least.

    Attributes:
        quantizer: as trained so far.
        history: (step, losses) every ``log_interval`` steps, for the report.

    Raises:
        TrainingError: a checkpoint of other options, other embeddings or another
            program.
        EmbeddingError: constant embeddings.
    """

    def __init__(
        self,
        config: MVQTrainingConfig,
        data: TrainingFrames,
        checkpoint: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        log_interval: int = 50,
        save_seconds: float = 60.0,
    ) -> None:
        self.config = config
        self.data = data
        self.checkpoint = Path(checkpoint)
        self.device = torch.device(device)
        self.log_interval = log_interval
        self.save_seconds = save_seconds
        self._saved = time.monotonic()
        ranks = dist.is_initialized()
        self.rank, self.world_size = (
            (dist.get_rank(), dist.get_world_size()) if ranks else (0, 1)
        )
        if config.batch_frames < self.world_size:
            raise TrainingError(
                f"batch_frames is {config.batch_frames} for {self.world_size} "
                "processes; at least one frame for each is needed"
            )
        self.history: list[dict[str, float]] = []
        self._recent: list[list[float]] = []  # losses since the last entry
        self.step = 0
        if self.checkpoint.exists():
            self._resume()
            return
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.quantizer = Quantizer(
                data.dim, PHASE_ONE_SIZE, 2 * config.num_codebooks
            )
        self._set_statistics()
        self._start_phase(self.quantizer)

    def train(self, progress: Callable[[str], None] = logging.info) -> Quantizer:
        """Take the steps that are left.

        Args:
            progress: gets a line now and then.

        Raises:
            TrainingError: the loss is no longer finite.
        """
        while self.step < self.config.total_iters:
            if self.step == self.config.iters_phase1 and not self._in_phase_two:
                self._start_phase(self.quantizer.product_quantizer())
            if self._needs_tables:
                if time.monotonic() - self._saved >= self.save_seconds:
                    self._save()
                self._tables = self.quantizer.tables()
            self._recent.append(self._take_step(self._tables))
            self.step += 1
            if self.step % self.log_interval == 0:
                self._log(progress)
        self.quantizer.stamp()
        return self.quantizer.eval()

    def finish(self) -> None:
        """Remove the checkpoint, once the quantizer is stored."""
        if self.rank == 0:
            self.checkpoint.unlink(missing_ok=True)

    @property
    def _needs_tables(self) -> bool:
        step = self.step - (self.config.iters_phase1 if self._in_phase_two else 0)
        return not self._in_phase_two or step % STEPS_PER_TABLES == 0

    @property
    def _in_phase_two(self) -> bool:
        return self.quantizer.num_codebooks == self.config.num_codebooks

    def _set_statistics(self) -> None:
        mean, std = channel_statistics(self.data, self.config.seed)
        if self.config.standardize:
            self.quantizer.mean.copy_(mean)
            self.quantizer.std.copy_(std)

    def _start_phase(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer.to(self.device).train()
        self.optimizer = torch.optim.Adam(
            self.quantizer.parameters(),
            lr=self.config.lr,
            betas=(0.9, 0.98),
            eps=1e-9,
            weight_decay=1e-6,
            fused=True,
        )

    def _take_step(self, tables: GramTables) -> list[float]:
        config = self.config
        batch = self.data.train_batch(config.batch_frames, config.seed, self.step)
        batch = batch[self.rank :: self.world_size]
        x = self.quantizer.standardise(batch.to(self.device))
        passes = 1 + int(np.random.default_rng([config.seed, self.step, 1]).integers(2))
        losses = quantizer_losses(self.quantizer, x, passes, tables)
        loss = losses.total()
        self.optimizer.zero_grad()
        loss.backward()
        # Losses too: all ranks must agree whether to stop.
        values = self._average_over_ranks(torch.stack(losses).detach()).tolist()
        if not np.isfinite(values).all():
            raise TrainingError(
                f"step {self.step}: the loss is {values}; lower --lr, or check the "
                f"embeddings in {self.data.source}"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(self.step)
        self.optimizer.step()
        return values

    def _average_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Averages gradients in place; returns the average of ``values``."""
        if self.world_size == 1:
            return values
        grads = [p.grad for p in self.quantizer.parameters() if p.grad is not None]
        for tensor in (*grads, values):
            dist.all_reduce(tensor)
            tensor /= self.world_size
        return values

    def _log(self, progress: Callable[[str], None]) -> None:
        losses = np.mean(self._recent, axis=0).tolist()
        self._recent.clear()
        entry = dict(zip(QuantizerLosses._fields, losses, strict=True))
        self.history.append({"step": self.step, **entry})
        phase = 2 if self._in_phase_two else 1
        figures = ", ".join(f"{name} {value:.4f}" for name, value in entry.items())
        progress(
            f"phase {phase}, step {self.step}/{self.config.total_iters}: {figures}"
        )

    def _facts(self) -> dict[str, Any]:
        """What a checkpoint must agree in."""
        return {"config": asdict(self.config), "embeddings": self.data.fingerprint()}

    def _save(self) -> None:
        if self.rank:
            return
        buffer = io.BytesIO()  # torch turns errors of a file into RuntimeErrors
        torch.save(
            {
                **self._facts(),
                "step": self.step,
                "history": self.history,
                "recent": self._recent,
                "quantizer": self.quantizer.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
            buffer,
        )
        write_atomically(self.checkpoint, buffer.getvalue())
        self._saved = time.monotonic()

    def _resume(self) -> None:
        remedy = f"remove {self.checkpoint} to start anew"
        try:
            state = torch.load(
                self.checkpoint, map_location=self.device, weights_only=True
            )
            found = {name: state[name] for name in self._facts()}
        except Exception as error:  # whatever the unpickler meets
            raise TrainingError(
                f"{self.checkpoint}: unreadable checkpoint, or another program's file "
                f"({type(error).__name__}); {remedy}"
            ) from error
        for name, value in self._facts().items():
            if found[name] != value:
                raise TrainingError(
                    f"{self.checkpoint}: was made with {name} {found[name]}, this run "
                    f"has {value}; use the same, or {remedy}"
                )
        self.step, self.history = state["step"], state["history"]
        self._recent = state["recent"]
        num, size, dim = state["quantizer"]["centers"].shape
        self._start_phase(Quantizer(dim, size, num))
        self.quantizer.load_state_dict(state["quantizer"])
        self.optimizer.load_state_dict(state["optimizer"])
        logging.info(f"{self.checkpoint}: going on after step {self.step}")

"""Training of a quantizer: losses [3.3] and two phases [3.4] of docs/method.md.

    L = sum |x_hat - x|^2 / sum |x - m|^2      x_hat of the codes found by the search
        - mean_n log softmax(l_n)[i_n]         so that the logits start the search well
        + 0.01 (log K - mean_n H(p_n)) / log K    p_n: the batch's mean softmax(l_n)

with m the mean of all sums of centres. The choice of codes carries no gradient. Phase 1
trains twice as many codebooks of 16 centres. Neighbours are then merged to codebooks of
256 centres, all sums of two, and phase 2 trains those.

If torch.distributed is initialised, every step's batch is divided among the ranks and
gradients are averaged, so that all hold the same quantizer; the first one alone writes.
"""

from __future__ import annotations

import logging
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from espnet2_spear.errors import UserError
from espnet2_spear.fileio.atomic import save_whole
from espnet2_spear.mvq.embedding_set import TrainingFrames
from espnet2_spear.mvq.quantizer import Quantizer
from espnet2_spear.mvq.search import GramTables, refine

PHASE_ONE_SIZE = 16
# The inner products of all centres cost more than the rest of a step of phase 2. In so
# few steps they change by little, and the search for codes may use those of before.
STEPS_PER_TABLES = 4
LOGITS_ENTROPY_WEIGHT = 0.01
STATS_FRAMES = 50_000  # of which mean and standard deviation are taken


class QuantizerLosses(NamedTuple):
    """Losses of a batch, scalars; see the head of this file.

    Attributes:
        reconstruction: squared error relative to that of the mean of all sums of
            centres; 0 is perfect.
        logprob: mean negative log-probability of the refined codes; it alone trains
            the logits to start the search well.
        logits_entropy: 0 if the batch's mean distribution over codes is uniform, 1 if
            it is a single code.
        index_entropy: the same of the codes themselves, without a gradient.
    """

    reconstruction: Tensor
    logprob: Tensor
    logits_entropy: Tensor
    index_entropy: Tensor

    def total(self) -> Tensor:
        """The loss that is minimised."""
        return (
            self.reconstruction
            + self.logprob
            + LOGITS_ENTROPY_WEIGHT * self.logits_entropy
        )


def quantizer_losses(
    quantizer: Quantizer,
    x: Tensor,
    refine_iters: int,
    tables: GramTables | None = None,
) -> QuantizerLosses:
    """Compute the losses of a batch; the choice of codes carries no gradient.

    Args:
        quantizer: to train.
        x: standardised vectors (B, D).
        refine_iters: passes of the search for the codes.
        tables: of the centres to search with; by default the present ones.

    Returns:
        float32 scalars, under autocast, too: the search subtracts large inner products.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        logits = quantizer.logits(x)
        with torch.no_grad():
            tables = tables or quantizer.tables()
            codes = logits.argmax(dim=-1)
            codes = refine(tables, tables.linear_terms(x), codes, refine_iters)
            mean = quantizer.scaled_centers().mean(dim=1).sum(dim=0)
            spread = (x - mean).square().sum() + 1e-20
        log_probs = logits.log_softmax(dim=-1)
        usage = code_usage(codes, quantizer.codebook_size) / len(codes)
        return QuantizerLosses(
            (quantizer.sum_centers(codes) - x).square().sum() / spread,
            F.nll_loss(log_probs.flatten(0, 1), codes.flatten()),
            _entropy_gap(log_probs.exp().mean(dim=0)),
            _entropy_gap(usage),
        )


def code_usage(codes: Tensor, codebook_size: int) -> Tensor:
    """Number of times that each code occurs.

    Args:
        codes: (B, N) int64.
        codebook_size: K.

    Returns:
        float32 (N, K).
    """
    num = codes.shape[1]
    first = torch.arange(num, device=codes.device) * codebook_size
    counts = torch.bincount((codes + first).flatten(), minlength=num * codebook_size)
    return counts.view(num, codebook_size).float()


def entropy(probs: Tensor) -> Tensor:
    """Entropy of distributions (..., K) in nats."""
    return -torch.special.xlogy(probs, probs).sum(dim=-1)


def _entropy_gap(probs: Tensor) -> Tensor:
    full = math.log(probs.shape[-1])
    return (full - entropy(probs).mean()) / full


def channel_statistics(data: TrainingFrames, seed: int) -> tuple[Tensor, Tensor]:
    """Measure a sample of the training frames.

    Args:
        data: embeddings.
        seed: of the sample.

    Returns:
        mean and standard deviation, float64 (D,) each; the latter is 1 for a channel
        that is constant, which is logged.

    Raises:
        UserError: all channels are constant.
    """
    frames = data.train_sample(STATS_FRAMES, seed).double()
    var, mean = torch.var_mean(frames, dim=0, correction=0)
    constant = var <= 1e-10 * (mean.square() + 1e-20)
    if constant.all():
        raise UserError(
            f"{data.source}: all frames are equal; the teacher does not see its "
            "audio, or the audio is silent"
        )
    if constant.any():
        logging.warning(
            f"{data.source}: {int(constant.sum())} of {data.dim} channels are constant"
        )
    return mean, var.sqrt().masked_fill(constant, 1.0)


def check_seed(seed: int) -> None:
    """Raise UserError for seeds that NumPy or scikit-learn would refuse."""
    if not 0 <= seed < 2**31:
        raise UserError(f"seed is {seed}; from 0 to {2**31 - 1}")


@dataclass(frozen=True)
class MVQTrainingConfig:
    """Options of the training of a quantizer.

    Attributes:
        num_codebooks: codebooks of 256 centres, a power of two: bytes per frame.
        standardize: train on, and keep with the quantizer, per-channel mean and
            standard deviation.
        iters_phase1: steps with 2 * num_codebooks codebooks of 16 centres.
        iters_phase2: steps with codebooks of 256 centres.
        batch_frames: frames per step.
        lr: of Adam in phase 1; half of it in phase 2; halved every quarter of a phase.
        seed: of the initial values and the draws of frames.

    Raises:
        UserError: values out of range.
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
                raise UserError(f"{name} is {getattr(self, name)}; at least 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError(f"lr is {self.lr}; a number above 0, such as 0.005")
        check_seed(self.seed)
        if self.num_codebooks not in (1, 2, 4, 8, 16, 32):
            raise UserError(
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
        UserError: a checkpoint of other options, other embeddings or another
            program.
        UserError: constant embeddings.
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
        self.rank: int = dist.get_rank() if ranks else 0
        self.world_size: int = dist.get_world_size() if ranks else 1
        if config.batch_frames < self.world_size:
            raise UserError(
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
        mean, std = channel_statistics(data, config.seed)
        if config.standardize:
            self.quantizer.mean.copy_(mean)
            self.quantizer.std.copy_(std)
        self._start_phase(self.quantizer)

    def train(self) -> Quantizer:
        """Take the steps that are left.

        Raises:
            UserError: the loss is no longer finite.
        """
        first = self.config.iters_phase1  # of phase 2
        while self.step < self.config.total_iters:
            if self.step == first and not self._in_phase_two:
                self._start_phase(self.quantizer.product_quantizer())
            if self.step < first or (self.step - first) % STEPS_PER_TABLES == 0:
                if time.monotonic() - self._saved >= self.save_seconds:
                    self._save()
                self._tables = self.quantizer.tables()
            self._recent.append(self._take_step(self._tables))
            self.step += 1
            if self.step % self.log_interval == 0:
                self._log()
        self.quantizer.stamp()
        return self.quantizer.eval()

    def finish(self) -> None:
        """Remove the checkpoint, once the quantizer is stored."""
        if self.rank == 0:
            self.checkpoint.unlink(missing_ok=True)

    @property
    def _in_phase_two(self) -> bool:
        return self.quantizer.num_codebooks == self.config.num_codebooks

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
            raise UserError(
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

    def _log(self) -> None:
        losses = np.mean(self._recent, axis=0).tolist()
        self._recent.clear()
        entry = dict(zip(QuantizerLosses._fields, losses, strict=True))
        self.history.append({"step": self.step, **entry})
        phase = 2 if self._in_phase_two else 1
        figures = ", ".join(f"{name} {value:.4f}" for name, value in entry.items())
        logging.info(
            f"phase {phase}, step {self.step}/{self.config.total_iters}: {figures}"
        )

    def _facts(self) -> dict[str, Any]:
        """Facts that a checkpoint must share with this run."""
        return {"config": asdict(self.config), "embeddings": self.data.fingerprint()}

    def _save(self) -> None:
        if self.rank:
            return
        content = {
            **self._facts(),
            "step": self.step,
            "history": self.history,
            "recent": self._recent,
            "quantizer": self.quantizer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_whole(content, self.checkpoint)
        self._saved = time.monotonic()

    def _resume(self) -> None:
        remedy = f"remove {self.checkpoint} to start anew"
        try:
            state = torch.load(
                self.checkpoint, map_location=self.device, weights_only=True
            )
            found = {name: state[name] for name in self._facts()}
        except Exception as error:  # whatever the unpickler meets
            raise UserError(
                f"{self.checkpoint}: unreadable checkpoint, or another program's file "
                f"({type(error).__name__}); {remedy}"
            ) from error
        for name, value in self._facts().items():
            if found[name] != value:
                raise UserError(
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

"""One optimizer step: gradients, a look at them, the update or a skip."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import espnet2.train.trainer as espnet_trainer
import torch
from espnet2.torch_utils.add_gradient_noise import add_gradient_noise
from espnet2.torch_utils.device_funcs import to_device
from espnet2.train.reporter import SubReporter

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.side_output import append_lines, side_output
from espnet2_spear.schedulers.eden import Eden
from espnet2_spear.train.batches import Window, count_audio, seed_all
from espnet2_spear.train.gradients import StepResult, accumulate_gradients
from espnet2_spear.train.run_state import RunState
from espnet2_spear.train.trainer_options import SpearTrainerOptions

SKIPPED = "skipped_steps.jsonl"
# A float16 training whose loss scale falls below this has other faults than overflow.
MIN_LOSS_SCALE = 2.0**-10


class TrainingError(RuntimeError):
    """A training that cannot go on; the message says what to do."""


@dataclass
class StepFigures:
    """What a step was, over all ranks, as plain numbers.

    Attributes:
        batches: accumulated (per rank).
        grad_norm: before clipping; not finite if the step was skipped for that.
        samples: of audio, 16 kHz, without padding.
        padded: the same with padding.
        utts: utterances.
        skipped_utts: utterances that could not be read, since the training began.
    """

    batches: int
    grad_norm: float
    samples: float
    padded: float
    utts: float
    skipped_utts: float


class OptimizerStep:
    """Does the steps of an epoch and tells ESPnet's reporter about them.

    Args:
        model: wrapped for several ranks, or not.
        optimizers: all of them step.
        schedulers: one or None for each.
        scaler: of float16 training; None without ``--use_amp true``.
        reporter: of the epoch.
        options: of the trainer.
        device: of the model.
        state: of the run; ``steps``, ``samples``, ``skipped`` and ``any_valid`` and
            its running average are kept up to date.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        schedulers: Sequence[Any],
        scaler: Any,
        reporter: SubReporter,
        options: SpearTrainerOptions,
        device: torch.device,
        state: RunState,
    ) -> None:
        self.model = model
        self.optimizers = optimizers
        self.schedulers = schedulers
        self.scaler = scaler
        self.reporter = reporter
        self.options = options
        self.device = device
        self.state = state

    def __call__(self, window: Window, start: float) -> StepFigures:
        """Do one step; the host waits for the device once.

        Args:
            window: at least one batch.
            start: when loading of the batches began (time.perf_counter).

        Raises:
            TrainingError: one skipped step too many.
        """
        result = self._gradients(window)
        options = self.options
        if self.scaler is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        if options.grad_noise:
            # The same noise on every rank, or their parameters would part.
            state = self.state
            seed_all("noise", options.seed, state.epoch, state.position)
            add_gradient_noise(
                self.model,
                self.reporter.get_total_count(),
                duration=100,
                eta=1.0,
                scale_factor=0.55,
            )
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), options.grad_clip, options.grad_clip_type
        )
        audio = [count_audio(batch) for _, batch in window.batches]
        fetched = _fetch(
            result, grad_norm, audio, len(self.state.skips), self.state.world_size
        )
        stats, weights, bad, bad_here, figures = fetched
        own = {}
        if any(bad) or not math.isfinite(figures.grad_norm):
            self._skip(window, bad, bad_here)
        else:
            own = self._update(figures)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        state = self.state
        state.steps += 1
        state.samples += figures.samples
        if state.rank == 0:
            state.average.after_step(state.model, state.steps)
        own["skipped_utts"] = figures.skipped_utts
        own["padding_waste"] = 1 - figures.samples / figures.padded
        own["train_time"] = time.perf_counter() - start
        for i, optimizer in enumerate(self.optimizers):
            for j, group in enumerate(optimizer.param_groups):
                own[f"optim{i}_lr{j}"] = group["lr"]
        for index, values in enumerate(stats):
            times = {
                "iter_time": window.load_seconds[index],
                "forward_time": result.forward_seconds[index],
                "backward_time": result.backward_seconds[index],
            }
            last = index == len(stats) - 1
            self.reporter.register(values, weights[index])
            self.reporter.register({**times, **own} if last else times)
            self.reporter.next()
        return figures

    def _gradients(self, window: Window) -> StepResult:
        """Leave the gradients of all batches in the parameters."""
        state, scaler = self.state, self.scaler
        batches = [
            {**to_device(batch, self.device, non_blocking=True), "utt_id": ids}
            for ids, batch in window.batches
        ]
        seed = (self.options.seed, state.epoch, state.rank)
        return accumulate_gradients(
            self.model,
            batches,
            lambda: autocast(self.options),
            lambda loss: (loss if scaler is None else scaler.scale(loss)).backward(),
            lambda index: seed_all("step", *seed, state.position + index),
        )

    def _update(self, figures: StepFigures) -> dict[str, float]:
        """Step optimizers and schedulers; returns what there is to report."""
        seconds = figures.samples / SAMPLE_RATE
        start = time.perf_counter()
        self.state.any_valid = True
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
            if isinstance(scheduler, Eden):
                scheduler.count_audio(seconds)
            if isinstance(scheduler, espnet_trainer.AbsBatchStepScheduler):
                scheduler.step()
        if self.scaler is not None:
            self.scaler.update()  # forgets which gradients it has unscaled
        return {
            "grad_norm": figures.grad_norm,
            "clip": 100.0 if figures.grad_norm > self.options.grad_clip else 0.0,
            "loss_scale": 1.0 if self.scaler is None else self.scaler.get_scale(),
            "optim_step_time": time.perf_counter() - start,
        }

    def _skip(
        self, window: Window, bad: Sequence[float], bad_here: Sequence[float]
    ) -> None:
        """Skip the step, which all ranks do together: they see the same sums."""
        state = self.state
        if self.scaler is not None:
            # Without scaler.step: it would step where gradients are finite and loss or
            # norm are not, and always if the scaler is disabled (a CPU).
            scale = self.scaler.get_scale()
            # A bad batch says nothing about the scale; an overflow lowers it.
            self.scaler.update(scale if any(bad) else None)
            if self.scaler.get_scale() < scale and scale > MIN_LOSS_SCALE:
                logging.info(f"gradients overflow at loss scale {scale:g}: lowered")
                return
        state.skipped += 1
        # Of gradients alone nobody knows whose they were.
        mine = [
            utt
            for (ids, _), is_bad in zip(window.batches, bad_here, strict=True)
            if is_bad or not any(bad)
            for utt in ids
        ]
        everyone = [mine]
        if state.world_size > 1:
            everyone = [[] for _ in range(state.world_size)]
            torch.distributed.all_gather_object(everyone, mine)
        path = state.output_dir / SKIPPED
        if state.rank == 0:
            record = {
                "epoch": state.epoch,
                "batch": state.position + 1,
                "step": state.steps + 1,
                "not_finite": "loss" if any(bad) else "gradient",
                "utterances": [utt for ids in everyone for utt in ids],
            }
            with side_output(path):
                append_lines(path, [json.dumps(record)])
            utts = record["utterances"]
            shown = ", ".join(utts[:8]) + (", ..." if utts[8:] else "")
            logging.warning(
                f"step {record['step']} is skipped: its {record['not_finite']} is not "
                f"finite. Utterances (all in {path}): {shown}"
            )
        if state.skipped > self.options.max_skipped_steps:
            raise TrainingError(
                f"{state.skipped} steps of epoch {state.epoch} had a loss or gradient "
                f"that is not finite, --max_skipped_steps is "
                f"{self.options.max_skipped_steps}. If {path} names the same "
                "utterances again and again, remove them; else lower the learning "
                "rate, or train in bfloat16 or float32. Then start again with "
                "--resume true"
            )


def autocast(options: SpearTrainerOptions) -> torch.autocast:
    """Precision of forward passes, as ESPnet chooses it."""
    return torch.autocast(
        "cuda", enabled=options.use_amp, **espnet_trainer.autocast_args
    )


def _fetch(
    result: StepResult,
    grad_norm: torch.Tensor,
    audio: Sequence[tuple[float, float, int]],
    skipped: int,
    world_size: int,
) -> tuple[list[dict[str, float]], list[float], list[float], list[float], StepFigures]:
    """Bring a step's figures to the host, in one transfer.

    Args:
        result: of the step.
        grad_norm: before clipping.
        audio: samples, samples with padding and utterances of this rank's batches.
        skipped: utterances that this rank could not read so far.
        world_size: ranks over which ``audio`` and ``skipped`` are added up.

    Returns:
        of each batch its statistics, weight, ranks whose loss was bad, and whether
        this one's was; figures of the step.
    """
    device, n = grad_norm.device, len(audio)
    total = torch.tensor(audio, dtype=torch.float64).sum(dim=0)
    total = torch.cat([total, total.new_tensor([skipped])]).to(device)
    if world_size > 1:
        torch.distributed.all_reduce(total)
    scalars = [*result.weights, *result.bad, *result.bad_here, grad_norm]
    scalars += [value for stats in result.stats for value in stats.values()]
    flat = torch.cat([torch.stack([s.double() for s in scalars]), total]).tolist()
    rest: Iterator[float] = iter(flat[3 * n :])
    norm = next(rest)
    stats = [{name: next(rest) for name in names} for names in result.stats]
    figures = StepFigures(n, norm, *rest)
    return stats, flat[:n], flat[n : 2 * n], flat[2 * n : 3 * n], figures

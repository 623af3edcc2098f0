"""One optimizer step: gradients, a look at them, the update or a skip."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import NamedTuple

import torch
from espnet2.schedulers.abs_scheduler import AbsBatchStepScheduler
from espnet2.torch_utils.add_gradient_noise import add_gradient_noise
from espnet2.torch_utils.device_funcs import to_device
from espnet2.train.reporter import SubReporter

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.optional_output import append_lines, warn_on_oserror
from espnet2_spear.schedulers.eden import Eden
from espnet2_spear.train.batches import Window, count_audio, seed_all
from espnet2_spear.train.checkpoint import SKIPPED, RunState
from espnet2_spear.train.gradients import StepResult, accumulate_gradients
from espnet2_spear.train.options import SpearTrainerOptions
from espnet2_spear.zipformer.schedule import BatchCountState

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
        state: of the run, whose optimizers and schedulers all step; its counters and
            its running average are kept up to date.
        statistics: of the epoch.
        options: of the trainer.
        skips: utterances that this rank could not read so far.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        state: RunState,
        statistics: SubReporter,
        options: SpearTrainerOptions,
        skips: Sized = (),
    ) -> None:
        self.model = model
        self.state = state
        self.statistics = statistics
        self.options = options
        self.skips = skips
        # Penalties of the network are added to gradients that the scale multiplies.
        self.counts = [
            module.count
            for module in state.model.modules()
            if isinstance(module, BatchCountState) and module.count is not None
        ]

    def __call__(self, window: Window) -> StepFigures:
        """Do one step; the host waits for the device once (with float16 twice).

        Args:
            window: at least one batch.

        Raises:
            TrainingError: one skipped step too many.
        """
        state, options = self.state, self.options
        start = time.perf_counter() - sum(window.load_seconds)
        result = self._gradients(window)
        if options.grad_noise:
            self._add_noise()
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), options.grad_clip, options.grad_clip_type
        )
        audio = [count_audio(batch) for _, batch in window.batches]
        fetched = _fetch(result, grad_norm, audio, len(self.skips), state.world_size)
        figures = fetched.figures
        shown = {}
        if any(fetched.bad) or not math.isfinite(figures.grad_norm):
            self._skip(window, fetched)
        else:
            shown = self._update(figures)
        for optimizer in state.optimizers:
            optimizer.zero_grad()
        state.steps += 1
        state.samples += figures.samples
        if state.rank == 0:
            state.average.after_step(state.model, state.steps)
        shown["skipped_utts"] = figures.skipped_utts
        shown["padding_waste"] = 1 - figures.samples / figures.padded
        shown["train_time"] = time.perf_counter() - start
        self._report(window, result, fetched, shown)
        return figures

    def _report(
        self,
        window: Window,
        result: StepResult,
        fetched: _Fetched,
        shown: dict[str, float],
    ) -> None:
        """Tell the reporter of every batch, and with the last one of the step."""
        for i, optimizer in enumerate(self.state.optimizers):
            for j, group in enumerate(optimizer.param_groups):
                shown[f"optim{i}_lr{j}"] = group["lr"]
        for index, (values, weight) in enumerate(
            zip(fetched.stats, fetched.weights, strict=True)
        ):
            times = {
                "iter_time": window.load_seconds[index],
                "forward_time": result.forward_seconds[index],
                "backward_time": result.backward_seconds[index],
            }
            last = index == len(fetched.stats) - 1
            self.statistics.register(values, weight)
            self.statistics.register({**times, **shown} if last else times)
            self.statistics.next()

    def _add_noise(self) -> None:
        """ESPnet's, but the same on every rank, or their parameters would part."""
        state = self.state
        seed_all("noise", self.options.seed, state.epoch, state.position)
        add_gradient_noise(
            self.model,
            self.statistics.get_total_count(),
            duration=100,
            eta=1.0,
            scale_factor=0.55,
        )

    def _gradients(self, window: Window) -> StepResult:
        """Leave the gradients of all batches in the parameters, without loss scale."""
        state, options, scaler = self.state, self.options, self.state.scaler
        for count in self.counts:
            count.loss_scale = 1.0 if scaler is None else scaler.get_scale()
        batches = [
            {**to_device(batch, options.device, non_blocking=True), "utt_id": ids}
            for ids, batch in window.batches
        ]
        seed = (options.seed, state.epoch, state.rank)
        result = accumulate_gradients(
            self.model,
            batches,
            options.autocast,
            lambda loss: (loss if scaler is None else scaler.scale(loss)).backward(),
            lambda index: seed_all("step", *seed, state.position + index),
        )
        if scaler is not None:
            for optimizer in state.optimizers:
                scaler.unscale_(optimizer)
        return result

    def _update(self, figures: StepFigures) -> dict[str, float]:
        """Step optimizers and schedulers; returns what there is to report."""
        state, scaler = self.state, self.state.scaler
        start = time.perf_counter()
        state.any_valid = True
        for optimizer, scheduler in zip(
            state.optimizers, state.schedulers, strict=True
        ):
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
            if isinstance(scheduler, Eden):
                scheduler.count_audio(figures.samples / SAMPLE_RATE)
            if isinstance(scheduler, AbsBatchStepScheduler):
                scheduler.step()
        if scaler is not None:
            scaler.update()  # forgets which gradients it has unscaled
        return {
            "grad_norm": figures.grad_norm,
            "clip": 100.0 if figures.grad_norm > self.options.grad_clip else 0.0,
            "loss_scale": 1.0 if scaler is None else scaler.get_scale(),
            "optim_step_time": time.perf_counter() - start,
        }

    def _skip(self, window: Window, fetched: _Fetched) -> None:
        """Skip the step, which all ranks do together: they see the same sums."""
        bad, bad_here = any(fetched.bad), fetched.bad_here
        state, scaler = self.state, self.state.scaler
        if scaler is not None:
            # Without scaler.step: it would step where gradients are finite and loss or
            # norm are not.
            scale = scaler.get_scale()
            # A bad batch says nothing about the scale; an overflow lowers it.
            scaler.update(scale if bad else None)
            if scaler.get_scale() < scale and scale > MIN_LOSS_SCALE:
                logging.info(f"gradients overflow at loss scale {scale:g}: lowered")
                return
        state.skipped += 1
        # Of gradients alone nobody knows whose they were.
        mine = [
            utt
            for (ids, _), is_bad in zip(window.batches, bad_here, strict=True)
            if is_bad or not bad
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
                "not_finite": "loss" if bad else "gradient",
                "utterances": [utt for ids in everyone for utt in ids],
            }
            with warn_on_oserror(path):
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


class _Fetched(NamedTuple):
    """Figures of a step on the host; all lists have an entry for each batch.

    Attributes:
        stats: over all ranks.
        weights: over all ranks.
        bad: ranks whose loss was not finite.
        bad_here: whether this one's was not.
        figures: of the step.
    """

    stats: list[dict[str, float]]
    weights: list[float]
    bad: list[float]
    bad_here: list[float]
    figures: StepFigures


def _fetch(
    result: StepResult,
    grad_norm: torch.Tensor,
    audio: Sequence[tuple[float, float, int]],
    skipped: int,
    world_size: int,
) -> _Fetched:
    """Bring a step's figures to the host, in one transfer.

    Args:
        result: of the step.
        grad_norm: before clipping.
        audio: samples, samples with padding and utterances of this rank's batches.
        skipped: utterances that this rank could not read so far.
        world_size: ranks over which ``audio`` and ``skipped`` are added up.
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
    return _Fetched(stats, flat[:n], flat[n : 2 * n], flat[2 * n : 3 * n], figures)

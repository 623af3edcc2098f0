"""One optimizer step: gradients, a look at them, the update or a skip."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sized
from dataclasses import dataclass

import torch
from espnet2.torch_utils.device_funcs import to_device
from espnet2.train.reporter import SubReporter

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.optional_output import append_lines, warn_on_oserror
from espnet2_spear.schedulers.eden import Eden
from espnet2_spear.train.batches import Window, seed_all
from espnet2_spear.train.checkpoint import SKIPPED, RunState
from espnet2_spear.train.gradients import (
    BatchResult,
    accumulate_gradients,
    register_figures,
    to_host,
)
from espnet2_spear.train.options import SpearTrainerOptions
from espnet2_spear.zipformer.schedule import BatchCountState

# A float16 training whose loss scale falls below this has other faults than overflow.
MIN_LOSS_SCALE = 2.0**-10


class TrainingError(RuntimeError):
    """A training that cannot go on; the message says what to do."""


@dataclass
class StepFigures:
    """Figures of a step, over all ranks.

    Attributes:
        batches: accumulated (per rank).
        grad_norm: before clipping; not finite if the step was skipped for that.
        samples: of audio, 16 kHz, without padding.
        utts: utterances.
        skipped_utts: utterances that could not be read, since the training began.
    """

    batches: int
    grad_norm: float
    samples: float
    utts: float
    skipped_utts: float


class OptimizerStep:
    """Does the steps of an epoch and tells ESPnet's reporter about them.

    Args:
        model: wrapped for several ranks, or not.
        state: of the run, whose optimizer and scheduler step; its counters and its
            running average are kept up to date.
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
        # Penalties of the network are added to gradients of the loss as it is scaled.
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
        results, times = self._gradients(window)
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), options.grad_clip, options.grad_clip_type
        )
        results, norm = to_host((results, norm))
        samples, padded, utts, skipped = (
            sum(result.sums[name] for result in results)
            for name in ("samples", "padded", "utts", "skipped_utts")
        )
        figures = StepFigures(len(results), norm, samples, utts, skipped)
        shown = {"skipped_utts": skipped, "padding_waste": 1 - samples / padded}
        if any(result.sums["bad"] for result in results) or not math.isfinite(norm):
            self._skip(window, results)
        else:
            shown |= self._update(figures)
        state.optimizer.zero_grad()
        state.steps += 1
        state.samples += samples
        if state.rank == 0:
            state.average.after_step(state.model, state.steps)
        shown["train_time"] = time.perf_counter() - start
        for i, group in enumerate(state.optimizer.param_groups):
            shown[f"optim0_lr{i}"] = group["lr"]
        times[-1] |= shown
        for result, load, other in zip(
            results, window.load_seconds, times, strict=True
        ):
            register_figures(self.statistics, result)
            self.statistics.register({"iter_time": load, **other}, 1.0)
            self.statistics.next()
        return figures

    def _gradients(
        self, window: Window
    ) -> tuple[list[BatchResult], list[dict[str, float]]]:
        """Leave the gradients of all batches in the parameters, without loss scale."""
        state, options, scaler = self.state, self.options, self.state.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        counts = [
            {
                "samples": float(batch["speech_lengths"].sum()),
                "padded": batch["speech"].numel(),
                "utts": len(ids),
                "skipped_utts": 0,
            }
            for ids, batch in window.batches
        ]
        counts[-1]["skipped_utts"] = len(self.skips)
        batches = [
            {**to_device(batch, options.device, non_blocking=True), "utt_id": ids}
            for ids, batch in window.batches
        ]
        seed = (options.seed, state.epoch, state.rank)

        def before_batch(index: int) -> None:
            seed_all("step", *seed, state.position + index)
            for count in self.counts:
                samples = counts[index]["samples"]
                count.loss_scale = scale * state.model.loss_scale(samples)

        results = accumulate_gradients(
            self.model,
            batches,
            counts,
            options.autocast,
            lambda loss: (loss if scaler is None else scaler.scale(loss)).backward(),
            before_batch,
        )
        if scaler is not None:
            scaler.unscale_(state.optimizer)
        return results

    def _update(self, figures: StepFigures) -> dict[str, float]:
        """Step optimizer and scheduler; returns what there is to report."""
        state, scaler = self.state, self.state.scaler
        start = time.perf_counter()
        state.any_valid = True
        if scaler is None:
            state.optimizer.step()
        else:
            scaler.step(state.optimizer)
            scaler.update()  # forgets which gradients it has unscaled
        if isinstance(state.scheduler, Eden):
            state.scheduler.count_audio(figures.samples / SAMPLE_RATE)
        if state.scheduler is not None:
            state.scheduler.step()
        return {
            "grad_norm": figures.grad_norm,
            "clip": 100.0 if figures.grad_norm > self.options.grad_clip else 0.0,
            "loss_scale": 1.0 if scaler is None else scaler.get_scale(),
            "optim_step_time": time.perf_counter() - start,
        }

    def _skip(self, window: Window, results: list[BatchResult]) -> None:
        """Skip the step, which all ranks do together: they see the same sums."""
        bad = any(result.sums["bad"] for result in results)
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
            for (ids, _), result in zip(window.batches, results, strict=True)
            if result.bad or not bad
            for utt in ids
        ]
        everyone = [mine]
        if state.world_size > 1:
            everyone = [[] for _ in range(state.world_size)]
            torch.distributed.all_gather_object(everyone, mine)
        path = state.output_dir / SKIPPED
        if state.rank == 0:
            utts = [utt for ids in everyone for utt in ids]
            record = {
                "epoch": state.epoch,
                "batch": state.position + 1,
                "step": state.steps + 1,
                "not_finite": "loss" if bad else "gradient",
                "utterances": utts,
            }
            with warn_on_oserror(path):
                append_lines(path, [json.dumps(record)])
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
                "utterances again and again, remove them; else train in bfloat16 or "
                "float32. Then start again with --resume true. Another learning rate "
                "needs another --output_dir, and --init_param of the last Nepoch.pth"
            )

"""ESPnet's trainer, for trainings that last weeks."""

from __future__ import annotations

import argparse
import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import espnet2.train.trainer as espnet_trainer
import torch
from espnet2.torch_utils.device_funcs import to_device
from espnet2.train.distributed_utils import DistributedOption
from espnet2.train.reporter import SubReporter
from espnet2.train.trainer import Trainer

from espnet2_spear.train.batches import ResumableIterFactory, windows
from espnet2_spear.train.checkpoint import atomic_saves
from espnet2_spear.train.gradient_layout import fix_gradient_layout
from espnet2_spear.train.gradients import evaluate
from espnet2_spear.train.interruption import Interrupted
from espnet2_spear.train.model_average import RunningAverage, save_epoch_average
from espnet2_spear.train.pictures import show_prediction
from espnet2_spear.train.progress import Progress, report_progress
from espnet2_spear.train.reporter import SpearReporter
from espnet2_spear.train.resume import prepare_folder, read_on_all_ranks, restore
from espnet2_spear.train.run_state import RunState
from espnet2_spear.train.step import OptimizerStep, autocast
from espnet2_spear.train.trainer_options import (
    SpearTrainerOptions,
    add_trainer_arguments,
    build_trainer_options,
    leave_out_missing_packages,
)


class SpearTrainer(Trainer):
    """Trainer whose runs can be killed at any moment and go on as if nothing happened.

    Beyond ESPnet's: checkpoints in the middle of an epoch, each whole or not there;
    random numbers that depend on the step only; the exact mean over accumulated
    batches and ranks; a running average of the model; steps with numbers that are not
    finite are skipped, listed and limited; ranks that die end the others; a line of
    progress. ESPnet's loop over epochs is used as it is.

    Class attributes:
        state: of the training that this process runs.
    """

    state: RunState

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the options of this trainer."""
        add_trainer_arguments(parser)

    @classmethod
    def build_options(cls, args: argparse.Namespace) -> SpearTrainerOptions:
        """Collect the options.

        Raises:
            ValueError: an option that this trainer does not support.
        """
        return build_trainer_options(args)

    @classmethod
    def run(
        cls,
        model: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        schedulers: Sequence[Any],
        train_iter_factory: Any,
        valid_iter_factory: Any,
        plot_attention_iter_factory: Any,
        trainer_options: SpearTrainerOptions,
        distributed_option: DistributedOption,
    ) -> None:
        """Train; ends with exit code 75 if a signal asked for it.

        Raises:
            TrainingError: too many steps were skipped.
            ResumeError: no checkpoint can be read.
            CheckpointWriteError: the files of an epoch cannot be written.
        """
        options, distributed = trainer_options, distributed_option.distributed
        if distributed_option.ngpu > 1 and not distributed:
            raise ValueError("several GPUs need --multiprocessing_distributed true")
        output_dir = Path(options.output_dir)
        state = cls.state = RunState(
            output_dir,
            model,
            optimizers,
            schedulers,
            RunningAverage(options.average_period),
            options.accum_grad,
            best_model_criterion=options.best_model_criterion,
        )
        if distributed:
            state.rank = torch.distributed.get_rank()
            state.world_size = torch.distributed.get_world_size()
        leave_out_missing_packages(options)
        prepare_folder(state, options.resume)
        with (
            state.stop.listen(),
            atomic_saves(state.complete),
            _own_reporter(state),
        ):
            super().run(
                model=model,
                optimizers=optimizers,
                schedulers=schedulers,
                train_iter_factory=ResumableIterFactory(
                    train_iter_factory, state.start_of
                ),
                valid_iter_factory=ResumableIterFactory(
                    valid_iter_factory, lambda epoch: 0
                ),
                plot_attention_iter_factory=(
                    plot_attention_iter_factory if options.use_matplotlib else None
                ),
                trainer_options=options,
                distributed_option=distributed_option,
            )

    @classmethod
    def resume(
        cls,
        checkpoint: str | Path,
        model: torch.nn.Module,
        reporter: SpearReporter,
        optimizers: Sequence[torch.optim.Optimizer],
        schedulers: Sequence[Any],
        scaler: Any,
        ngpu: int = 0,
        strict: bool = True,
    ) -> None:
        """Go on from the last checkpoint that is whole.

        Raises:
            ResumeError: there is none.
        """
        state = cls.state
        path, content = read_on_all_ranks(Path(checkpoint).parent, state)
        restore(
            path,
            content,
            state,
            model,
            reporter,
            optimizers,
            schedulers,
            scaler,
            strict,
        )

    @classmethod
    def train_one_epoch(
        cls,
        model: torch.nn.Module,
        iterator: Iterable,
        optimizers: Sequence[torch.optim.Optimizer],
        schedulers: Sequence[Any],
        scaler: Any,
        reporter: SubReporter,
        summary_writer: Any,
        options: SpearTrainerOptions,
        distributed_option: DistributedOption,
    ) -> bool:
        """Train what is left of an epoch.

        Returns:
            whether every step had to be skipped.
        """
        state = cls.state
        state.begin_epoch(reporter.get_epoch())
        state.scaler, state.train_reporter = scaler, reporter
        state.summary_writer = summary_writer
        state.skips = getattr(iterator, "skips", ())
        device = torch.device("cuda" if options.ngpu > 0 else "cpu")
        if distributed_option.distributed and not state.laid_out:
            fix_gradient_layout(model, device, partial(autocast, options))
            state.laid_out = True
        model.train()
        batches = _length(iterator)
        progress = Progress(options.max_epoch, batches and state.position + batches)
        log_interval = options.log_interval or max((batches or 2000) // 20, 10)
        step = OptimizerStep(
            model, optimizers, schedulers, scaler, reporter, options, device, state
        )
        groups = windows(
            iterator,
            options.accum_grad,
            state.position,
            (options.seed, state.epoch, state.rank),
            lambda: state.stop.requested,
            device if distributed_option.distributed else None,
        )
        with contextlib.closing(groups):
            start = time.perf_counter()
            for window in groups:
                if window.stop:
                    cls._stop()
                if options.no_forward_run:
                    state.any_valid = True
                    continue
                figures = step(window, start)
                start = time.perf_counter()
                progress.count(figures)
                done = state.position // log_interval
                state.position += figures.batches
                if state.position // log_interval != done:
                    report_progress(progress, state, optimizers, reporter, options)
                if options.save_interval and state.steps % options.save_interval == 0:
                    state.save()
        return not state.any_valid

    @classmethod
    def validate_one_epoch(
        cls,
        model: torch.nn.Module,
        iterator: Iterable,
        reporter: SubReporter,
        options: SpearTrainerOptions,
        distributed_option: DistributedOption,
    ) -> None:
        """Validate; then what belongs to the end of an epoch."""
        state = cls.state
        device = torch.device("cuda" if options.ngpu > 0 else "cpu")
        model.eval()
        groups = windows(
            iterator,
            1,
            0,
            (options.seed, "valid"),
            lambda: state.stop.requested,
            device if distributed_option.distributed else None,
        )
        with contextlib.closing(groups):
            for window in groups:
                if window.stop:
                    cls._stop()
                if options.no_forward_run:
                    continue
                ids, batch = window.batches[0]
                batch = {**to_device(batch, device, non_blocking=True), "utt_id": ids}
                stats, weight = evaluate(model, batch, partial(autocast, options))
                reporter.register(stats, weight)
                reporter.next()
        state.gather_ranks()
        if state.rank == 0:
            save_epoch_average(
                state.average,
                state.model,
                state.output_dir,
                state.epoch,
                options.keep_averages,
            )

    @classmethod
    @torch.no_grad()
    def plot_attention(
        cls,
        model: torch.nn.Module,
        output_dir: Path | None,
        summary_writer: Any,
        iterator: Iterable,
        reporter: SubReporter,
        options: SpearTrainerOptions,
    ) -> None:
        """Draw what is predicted of ``num_att_plot`` utterances.

        Where other models draw their attention; into ``predictions/<utterance>/``. With
        ``iterator_type: task`` they are spread over the data, else they are the first.
        """
        assert output_dir is not None  # ESPnet's loop always names one
        device = torch.device("cuda" if options.ngpu > 0 else "cpu")
        student = cls.state.model.eval()
        for ids, batch in iterator:
            with autocast(options):
                predictions = student.predict(**to_device(batch, device))
            for utt, prediction in zip(ids, predictions, strict=True):
                show_prediction(
                    prediction,
                    utt,
                    reporter.get_epoch(),
                    output_dir.with_name("predictions"),
                    summary_writer,
                    options.use_wandb,
                )
            reporter.next()

    @classmethod
    def _stop(cls) -> None:
        """Write a checkpoint and end, on all ranks."""
        cls.state.save()
        logging.warning(
            "the training was asked to stop and ends; the same command with --resume "
            "true goes on"
        )
        raise Interrupted


def _length(iterator: Iterable) -> int | None:
    try:
        return len(iterator)  # type: ignore[arg-type]
    except TypeError:
        return None


@contextlib.contextmanager
def _own_reporter(state: RunState) -> Iterator[None]:
    """Let ESPnet's loop, which makes its reporter itself, make one of ours."""

    def make() -> SpearReporter:
        state.reporter = SpearReporter()
        return state.reporter

    plain = espnet_trainer.Reporter
    espnet_trainer.Reporter = make
    try:
        yield
    finally:
        espnet_trainer.Reporter = plain

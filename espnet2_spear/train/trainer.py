"""The training loop, for trainings that last weeks.

ESPnet's task builds model, optimizers and data and hands them to ``SpearTrainer.run``;
:class:`Training` is what happens then, from top to bottom. Beyond ESPnet's trainer it
can be killed at any moment and go on as if nothing had happened (checkpoint.py), with
random numbers that depend on the step only and the exact mean over accumulated batches
and ranks (gradients.py); it skips, lists and limits steps with numbers that are not
finite (step.py), keeps a running average of the model (average.py), and says in one
line how it is doing (progress.py).

It relies on these parts of ESPnet's: the arguments of ``Trainer.run``, the options of
``TrainerOptions``, ``Reporter`` and ``SubReporter`` and ``average_nbest_models``;
nothing of ESPnet's is changed or replaced.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from espnet2.iterators.abs_iter_factory import AbsIterFactory
from espnet2.main_funcs.average_nbest_models import average_nbest_models
from espnet2.torch_utils.device_funcs import to_device
from espnet2.torch_utils.set_all_random_seed import set_all_random_seed
from espnet2.train.distributed_utils import DistributedOption
from espnet2.train.reporter import SubReporter
from espnet2.train.trainer import Trainer
from torch.nn.parallel import DistributedDataParallel

from espnet2_spear.fileio.atomic import CheckpointWriteError, point_link, save_whole
from espnet2_spear.train.average import RunningAverage, save_epoch_average
from espnet2_spear.train.batches import open_epoch, windows
from espnet2_spear.train.checkpoint import (
    RunState,
    prepare_folder,
    restore_statistics,
    resume_from_folder,
)
from espnet2_spear.train.gradients import evaluate_batch, register_figures
from espnet2_spear.train.interruption import Interrupted, StopRequest
from espnet2_spear.train.options import (
    SpearTrainerOptions,
    add_trainer_arguments,
    build_trainer_options,
    disable_missing_backends,
)
from espnet2_spear.train.progress import Progress
from espnet2_spear.train.step import OptimizerStep


class SpearTrainer(Trainer):
    """The door through which ESPnet's tasks come to :class:`Training`."""

    add_arguments = staticmethod(add_trainer_arguments)
    build_options = staticmethod(build_trainer_options)

    @classmethod
    def run(
        cls,
        model: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        schedulers: Sequence[Any],
        train_iter_factory: AbsIterFactory,
        valid_iter_factory: AbsIterFactory,
        plot_attention_iter_factory: AbsIterFactory | None,
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
        (optimizer,), (scheduler,) = optimizers, schedulers
        state = RunState(
            Path(options.output_dir),
            model,
            optimizer,
            scheduler,
            RunningAverage(options.average_period),
            options.grad_scaler(),
            options.accum_grad,
        )
        if distributed:
            state.rank = torch.distributed.get_rank()
            state.world_size = torch.distributed.get_world_size()
        disable_missing_backends(options)
        Training(
            state,
            options,
            train_iter_factory,
            valid_iter_factory,
            plot_attention_iter_factory if options.use_matplotlib else None,
        ).run()


class Training:
    """One training, from its first step or its last checkpoint to its end.

    Args:
        state: of the run.
        options: of the trainer.
        train_data: makes the batches of an epoch.
        valid_data: makes those of its validation.
        plot_data: makes those of which predictions are drawn; None: draw nothing.
    """

    def __init__(
        self,
        state: RunState,
        options: SpearTrainerOptions,
        train_data: AbsIterFactory,
        valid_data: AbsIterFactory,
        plot_data: AbsIterFactory | None,
    ) -> None:
        self.state, self.options = state, options
        self.train_data, self.valid_data = train_data, valid_data
        self.plot_data = plot_data
        self.stop = StopRequest()
        self.progress = Progress(options, state)
        self.model: torch.nn.Module = state.model  # wrapped, if there are several ranks
        self.statistics: SubReporter | None = None  # of the epoch's training

    def run(self) -> None:
        """Train all epochs that are left."""
        state, options = self.state, self.options
        if prepare_folder(state, options.resume):
            resume_from_folder(state)
        if state.world_size > 1:
            self.model = self._wrap_for_ranks()
        with self.stop.listen():
            try:
                self._train_epochs()
            except Interrupted:
                # The loader and its workers have ended: they would not wait for a
                # large checkpoint.
                self._save_within_epoch()
                if state.world_size > 1:
                    # Whoever starts ranks ends all of them soon after the first.
                    torch.distributed.barrier()
                logging.warning(
                    "the training was asked to stop and ends; the same command with "
                    "--resume true goes on"
                )
                raise
        if state.rank == 0:
            average_nbest_models(
                output_dir=state.output_dir,
                reporter=state.reporter,
                best_model_criterion=options.best_model_criterion,
                nbest=self._nbest(),
            )

    def _train_epochs(self) -> None:
        state, options = self.state, self.options
        observe = state.reporter.observe
        while state.epoch <= options.max_epoch:
            logging.info(f"{state.epoch}/{options.max_epoch}epoch started")
            set_all_random_seed(options.seed + state.epoch)
            state.reporter.set_epoch(state.epoch)
            with observe("train") as statistics:
                self.train_epoch(statistics)
            with observe("valid") as statistics:
                self.validate(statistics)
            if self.plot_data is not None and state.rank == 0:
                with observe("att_plot") as statistics:
                    self.draw_predictions(statistics)
            any_valid = state.any_valid
            self._finish_epoch()
            if not any_valid:
                logging.warning("no step of the epoch was valid: training ends")
                break

    def train_epoch(self, statistics: SubReporter) -> None:
        """Train what is left of the epoch."""
        state, options = self.state, self.options
        self.statistics = statistics
        if state.interrupted is not None:
            restore_statistics(statistics, state.interrupted)
            state.interrupted = None
        batches, total, skips = open_epoch(self.train_data, state.epoch, state.position)
        self.progress.begin_epoch(total)
        step = OptimizerStep(self.model, state, statistics, options, skips)
        seed = (options.seed, state.epoch, state.rank)
        self.model.train()
        groups = windows(batches, options.accum_grad, state.position, seed, self._agree)
        with contextlib.closing(groups):
            for window in groups:
                figures = step(window)
                state.position += figures.batches
                self.progress.count(figures, statistics)
                if options.save_interval and state.steps % options.save_interval == 0:
                    self._save_within_epoch()

    def validate(self, statistics: SubReporter) -> None:
        """Register the figures of every batch of the validation."""
        options = self.options
        batches, *_ = open_epoch(self.valid_data, self.state.epoch)
        self.model.eval()
        groups = windows(batches, 1, 0, (options.seed, "valid"), self._agree)
        with contextlib.closing(groups):
            for window in groups:
                ids, batch = window.batches[0]
                batch = to_device(batch, options.device, non_blocking=True)
                batch["utt_id"] = ids
                result = evaluate_batch(self.model, batch, options.autocast)
                register_figures(statistics, result)
                statistics.next()

    @torch.no_grad()
    def draw_predictions(self, statistics: SubReporter) -> None:
        """Draw what is predicted of ``num_att_plot`` utterances.

        Where other models draw their attention; into ``predictions/<utterance>/``. With
        ``iterator_type: task`` they are spread over the data, else they are the first.
        """
        state, options = self.state, self.options
        assert self.plot_data is not None
        student = state.model.eval()
        for ids, batch in open_epoch(self.plot_data, state.epoch)[0]:
            with options.autocast():
                predictions = student.predict(**to_device(batch, options.device))
            for utt, prediction in zip(ids, predictions, strict=True):
                self.progress.show_prediction(prediction, utt)
            statistics.next()

    def _agree(self, count: int) -> int:
        """How many batches every rank has for a step.

        Ends the training when any rank was asked to stop. The step is not even begun:
        its batches come again when the training is resumed.
        """
        stop = self.stop.requested
        if self.state.world_size > 1:
            shared = torch.tensor([count, -int(stop)], device=self.options.device)
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MIN)
            count, stop = shared.tolist()
        if stop:
            raise Interrupted
        return count

    def _save_within_epoch(self) -> None:
        """Write a checkpoint; a full disk costs this one, not the training."""
        try:
            self.state.save(self.statistics)
        except CheckpointWriteError as error:
            logging.error(f"the training goes on without this checkpoint: {error}")

    def _finish_epoch(self) -> None:
        """Write the epoch's files and, when they are whole, its checkpoint."""
        state, options = self.state, self.options
        folder, epoch = state.output_dir, state.epoch
        if state.rank == 0:
            self.progress.show_epoch(state.reporter)
            save_epoch_average(
                state.average, state.model, folder, epoch, options.keep_averages
            )
            file = folder / f"{epoch}epoch.pth"
            save_whole(state.model.state_dict(), file)
            best = [k for k, epochs in self._ranking().items() if epochs[0] == epoch]
            for name in ["latest", *(f"{criterion}.best" for criterion in best)]:
                point_link(folder / f"{name}.pth", file.name)
        state.begin_next_epoch()
        state.save()
        if state.rank == 0:
            kept = max(self._nbest())
            good = {e for epochs in self._ranking().values() for e in epochs[:kept]}
            for e in set(range(1, epoch)) - good:
                (folder / f"{e}epoch.pth").unlink(missing_ok=True)

    def _ranking(self) -> dict[str, list[int]]:
        """Criterion such as ``valid.loss`` -> epochs, the best one first."""
        reporter = self.state.reporter
        return {
            f"{phase}.{name}": reporter.sort_epochs(phase, name, mode)
            for phase, name, mode in self.options.best_model_criterion
            if reporter.has(phase, name)
        }

    def _nbest(self) -> list[int]:
        """How many of the best epochs are averaged, and so kept."""
        nbest = self.options.keep_nbest_models
        return [nbest] if isinstance(nbest, int) else list(nbest) or [1]

    def _wrap_for_ranks(self) -> DistributedDataParallel:
        """Let the gradients of all ranks meet.

        Where a gradient lies decides in which order its elements and its ranks are
        added up. DistributedDataParallel lays gradients out anew after its first
        backward pass, unless it looks for unused parameters (the default of this task):
        only then does a resumed training do its first step in the same order, and so
        with the same last bits, as one that was not interrupted.
        """
        options = self.options
        devices = [torch.cuda.current_device()] if options.ngpu > 0 else None
        return DistributedDataParallel(
            self.state.model,
            device_ids=devices,
            find_unused_parameters=options.unused_parameters,
            gradient_as_bucket_view=options.gradient_as_bucket_view,
        )

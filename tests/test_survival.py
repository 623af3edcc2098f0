"""Trainings that are killed, starved of disk or fed with nonsense still arrive."""

import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest
import torch
from espnet2.train.reporter import Reporter
from espnet2.train.trainer import Trainer, TrainerOptions
from tiny_training import (
    difference,
    options,
    start,
    train,
    with_other_audio,
    write_data,
    write_nan,
)

from espnet2_spear.schedulers.eden import Eden
from espnet2_spear.tasks.spear import SpearTask
from espnet2_spear.train import step
from espnet2_spear.train.average import RunningAverage
from espnet2_spear.train.checkpoint import (
    SKIPPED,
    RunState,
    read_last_good,
)
from espnet2_spear.train.interruption import EXIT_INTERRUPTED
from espnet2_spear.train.trainer import SpearTrainer

# Of ESPnet's trainer; all of them have an effect here or are refused.
ESPNET_OPTIONS = {
    *("accum_grad", "adapter", "best_model_criterion", "create_graph_in_tensorboard"),
    *("ddp_comm_hook", "early_stopping_criterion", "gradient_as_bucket_view"),
    *("grad_clip", "grad_clip_type", "grad_noise", "keep_nbest_models"),
    *("log_interval", "max_epoch", "nbest_averaging_interval", "ngpu"),
    *("no_forward_run", "output_dir", "patience", "resume", "save_strategy", "seed"),
    *("sharded_ddp", "train_dtype", "unused_parameters", "use_adapter", "use_amp"),
    *("use_matplotlib", "use_tensorboard", "use_wandb", "val_scheduler_criterion"),
    "wandb_model_log_interval",
}
RESULTS = ("1epoch.pth", "2epoch.pth", "running_average/2epoch.pth")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nothing happened to: 12 steps."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(options(data, folder / "exp"), folder / "log") == 0
    return folder / "exp"


def signal_at(where: str, call: int, number: int) -> Callable[[], None]:
    """In the process to come: a signal at the n-th step, sync or rename of a file."""

    def before() -> None:
        owner, name = {
            "step": (step.OptimizerStep, "_update"),
            "written": (os, "fsync"),
            "renamed": (os, "replace"),
        }[where]
        plain, count = getattr(owner, name), [0]

        def counted(*args, **kwargs):
            count[0] += 1
            if count[0] == call:
                os.kill(os.getpid(), number)
            return plain(*args, **kwargs)

        setattr(owner, name, counted)

    return before


def assert_same(whole: Path, interrupted: Path) -> None:
    for name in RESULTS:
        assert difference(whole / name, interrupted / name) == ""
    for name in ("latest.pth", "valid.loss.best.pth"):
        assert os.readlink(whole / name) == os.readlink(interrupted / name)


@pytest.mark.second_env
def test_killed_anywhere_and_resumed(data, whole, tmp_path):
    cmd = options(data, tmp_path / "exp", "--save_interval", 2)
    for where, call, number, code in (
        ("step", 4, signal.SIGKILL, -signal.SIGKILL),  # resumes after 2 steps
        ("step", 2, signal.SIGUSR1, EXIT_INTERRUPTED),  # after 4
        ("written", 1, signal.SIGKILL, -signal.SIGKILL),  # mid-checkpoint: after 4
        # Renamed are: previous and checkpoint of step 6, running average, 1epoch.pth,
        # links to it (latest, best), previous and checkpoint. Dies before each in turn.
        ("renamed", 3, signal.SIGKILL, -signal.SIGKILL),
        *[("renamed", n, signal.SIGKILL, -signal.SIGKILL) for n in (2, 6)],
        ("step", 1, signal.SIGTERM, EXIT_INTERRUPTED),  # in the second epoch
        ("step", 4, signal.SIGKILL, -signal.SIGKILL),
    ):
        assert train(cmd, tmp_path / "log", signal_at(where, call, number)) == code
    assert train(cmd, tmp_path / "log") == 0
    assert_same(whole, tmp_path / "exp")
    assert not list((tmp_path / "exp").rglob(".*.part"))
    log = (tmp_path / "log").read_text()
    for position in ("after 2 batches of epoch 1", "after 4 batches of epoch 1"):
        assert f"the training goes on {position}" in log
    # Statistics of the interrupted epochs are those of whole ones.
    states = [
        torch.load(p / "checkpoint.pth", weights_only=True)["reporter"]["stats"]
        for p in (whole, tmp_path / "exp")
    ]
    for epoch in (1, 2):
        for key in ("loss", "speech_speech_acc_group1", "grad_norm", "padding_waste"):
            one, other = (s[epoch]["train"][key] for s in states)
            assert one == pytest.approx(other, rel=1e-12), key
        assert states[0][epoch]["valid"]["loss"] == states[1][epoch]["valid"]["loss"]
    for key in ("mixed_noise", "mixed_utterance"):
        shares = [[s[epoch]["train"][key] for epoch in (1, 2)] for s in states]
        assert max(shares[0]) > 0.1 and shares[0] == pytest.approx(shares[1], rel=1e-12)


@pytest.mark.second_env
def test_espnets_trainer_goes_on_from_ours(whole, tmp_path):
    path = whole / "checkpoint.pth"
    model, args = SpearTask.build_model_from_file(whole / "config.yaml")
    (optimizer,) = SpearTask.build_optimizers(args, model)
    parts = optimizer, Eden(optimizer, **args.scheduler_conf)
    state = RunState(tmp_path, model, *parts, RunningAverage(0))
    reporter = Reporter()
    Trainer.resume(path, model, reporter, *([part] for part in parts), scaler=None)
    assert reporter.get_epoch() == 2 and reporter.has("valid", "loss")
    content = torch.load(path, weights_only=True)
    state.load(content, path)
    assert (state.epoch, state.position, state.steps) == (3, 0, 12)


REFUSED = {"grad_noise": "true", "patience": "3", "ddp_comm_hook": "bf16_compress_hook"}
REFUSED |= {"no_forward_run": "true", "scheduler": "reducelronplateau"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *REFUSED.items(),
        ("scheduler", "warmupreducelronplateau"),
        ("nbest_averaging_interval", "1"),
        ("wandb_model_log_interval", "5"),
        ("create_graph_in_tensorboard", "true"),
        ("use_adapter", "true"),
        ("sharded_ddp", "true"),
    ],
)
def test_options_without_effect_are_refused(name, value):
    cmd = ["--output_dir", "exp", f"--{name}", value]
    with pytest.raises(ValueError, match=f"--{name} "):
        SpearTrainer.build_options(SpearTask.get_parser().parse_args(cmd))


@pytest.mark.second_env
def test_espnet_calls_trainers_as_ours_is_called():
    """The loop is ours: what ESPnet's may get besides, it has to learn."""
    one, other = (list(signature(t.run).parameters) for t in (Trainer, SpearTrainer))
    assert one == other
    assert {f.name for f in fields(TrainerOptions)} == ESPNET_OPTIONS


def test_signal_to_all_processes_of_a_job(data, whole, tmp_path):
    """As Slurm does it: the loader's workers get SIGTERM, too; batches accumulate."""
    common = ("--num_workers", 2, "--accum_grad", 2, "--max_epoch", 60)
    cmd = options(data, tmp_path / "exp", *common, "--save_interval", 0)
    process = start(cmd, tmp_path / "log", os.setpgrp)
    while not (tmp_path / "exp" / "1epoch.pth").exists():
        time.sleep(0.02)
        assert process.is_alive()
    os.killpg(process.pid, signal.SIGTERM)
    process.join(300)
    assert process.exitcode == EXIT_INTERRUPTED
    assert "asked to stop" in (tmp_path / "log").read_text()
    last = torch.load(tmp_path / "exp" / "checkpoint.pth", weights_only=True)["spear"]
    until = ("--max_epoch", last["epoch"] + 1)
    assert train([*cmd, *map(str, until)], tmp_path / "log") == 0
    cmd = options(data, tmp_path / "other", *common, *until)
    assert train(cmd, tmp_path / "log") == 0
    name = f"{last['epoch'] + 1}epoch.pth"
    assert difference(tmp_path / "exp" / name, tmp_path / "other" / name) == ""


def test_full_disk(data, whole, tmp_path):
    """Curves are left out, checkpoints of the middle of an epoch as well."""
    cmd = options(data, tmp_path / "exp", "--save_interval", 4)
    cmd += ["--use_tensorboard", "true", "--log_interval", "1"]

    def limit_files(steps: range, forever: bool) -> Callable[[], None]:
        """Enough for the log, not for a checkpoint: writes fail as on a full disk."""

        def before() -> None:
            def before_step(self, *args):
                hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                size = 200_000 if self.state.steps in steps else hard
                new = (size, size if forever else hard)
                resource.setrlimit(resource.RLIMIT_FSIZE, new)
                if self.state.steps in steps:
                    for events in (tmp_path / "exp/tensorboard").glob("*/events*"):
                        os.truncate(events, size)  # nothing can be appended
                return plain(self, *args)

            plain = step.OptimizerStep._update
            step.OptimizerStep._update = before_step
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        return before

    # The checkpoint of the epoch's end ends the training; the one of step 4 is whole.
    assert train(cmd, tmp_path / "log", limit_files(range(5, 99), True)) == 1
    log = (tmp_path / "log").read_text()
    assert "CheckpointWriteError" in log and "MiB are free on that disk" in log
    assert "TensorBoard's curves: cannot be written" in log
    assert not list((tmp_path / "exp").rglob(".*.part"))
    content, _ = read_last_good(tmp_path / "exp")[::-1]
    assert content["spear"]["position"] == 4

    # One in the middle of an epoch is left out: step 8, in the second epoch.
    assert train(cmd, tmp_path / "log2", limit_files(range(7, 8), False)) == 0
    log = (tmp_path / "log2").read_text()
    assert "goes on without this checkpoint" in log
    assert "TensorBoard's curves: cannot be written" in log
    assert_same(whole, tmp_path / "exp")


def test_damaged_checkpoint(data, whole, tmp_path):
    exp = tmp_path / "exp"
    cmd = options(data, exp, "--save_interval", 2)
    kill = signal_at("step", 6, signal.SIGKILL)
    assert train(cmd, tmp_path / "log", kill) == -signal.SIGKILL
    content = (exp / "checkpoint.pth").read_bytes()
    (exp / "checkpoint.pth").write_bytes(content[: len(content) // 2])
    assert train(cmd, tmp_path / "log") == 0
    assert_same(whole, exp)
    log = (tmp_path / "log").read_text()
    assert "checkpoint.pth: cannot be read" in log
    assert "checkpoint.prev.pth: the training goes on after 2 batches" in log
    # Another schedule would have no effect.
    other = ["--scheduler_conf", "lr_batches=90", "--max_epoch", "3"]
    assert train([*cmd, *other], tmp_path / "log2") == 1
    log = (tmp_path / "log2").read_text()
    assert "ResumeError" in log and "lr_batches was 100" in log
    # It begins anew, but what was there is not lost, nor taken for its own.
    fresh = [*cmd, "--resume", "false"]
    kill = signal_at("step", 1, signal.SIGKILL)
    assert train(fresh, tmp_path / "log2", kill) == -signal.SIGKILL
    assert not list(exp.glob("checkpoint*")) and not (exp / "running_average").exists()
    assert read_last_good(exp / "before")[1]["spear"]["epoch"] == 3
    for name in ("checkpoint.pth", "checkpoint.prev.pth"):
        (exp / name).write_bytes(b"nothing")
    assert train(cmd, tmp_path / "log3") == 1
    assert "ResumeError" in (tmp_path / "log3").read_text()


def test_steps_with_nan_are_skipped(data, tmp_path):
    write_nan(data, tmp_path / "nan.wav", utt := "u0004")
    cmd = options(data, tmp_path / "exp")
    cmd = with_other_audio(cmd, data, {utt: tmp_path / "nan.wav"})
    assert train(cmd, tmp_path / "log") == 0
    skipped = (tmp_path / "exp" / SKIPPED).read_text().splitlines()
    assert len(skipped) == 2 and utt in skipped[0] and '"loss"' in skipped[0]
    assert (
        f"is not finite. Utterances (all in {tmp_path}"
        in (tmp_path / "log").read_text()
    )
    for value in torch.load(tmp_path / "exp/2epoch.pth", weights_only=True).values():
        assert value.isfinite().all()
    cmd += ["--max_skipped_steps", "0", "--max_epoch", "3"]
    assert train(cmd, tmp_path / "log2") == 1
    log = (tmp_path / "log2").read_text()
    assert "TrainingError: 1 steps of epoch 3" in log and "remove them" in log
    # A training that begins anew does not go on with the lists of another.
    (tmp_path / "exp" / "skipped_train.rank3.txt").write_text("u audio_empty x\n")
    assert train([*cmd, "--resume", "false"], tmp_path / "log3") == 1
    assert len((tmp_path / "exp" / SKIPPED).read_text().splitlines()) == 1
    assert not (tmp_path / "exp" / "skipped_train.rank3.txt").exists()

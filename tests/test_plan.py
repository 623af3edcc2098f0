"""The plan of a pre-training: its memory is that of a real step on a CPU."""

import random
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from espnet2_spear.bin import spear_plan
from espnet2_spear.errors import UserError
from espnet2_spear.tasks.spear import SpearTask
from espnet2_spear.train import simulate
from espnet2_spear.zipformer.config import STACK_FIELDS, ZipformerConfig

CONF = Path(__file__).resolve().parent.parent / "conf"
MINI = CONF / "train_spear_mini_speech_audio.yaml"


def options_of(size: str) -> Namespace:
    config = CONF / f"train_spear_{size}_speech_audio.yaml"
    command = ["--config", str(config), "--output_dir", "unused"]
    options = SpearTask.get_parser().parse_args(command)
    if size == "base":  # as wide as published; a layer in each of three stacks
        base = ZipformerConfig.from_name("base")
        stacks = {name: getattr(base, name)[:3] for name in STACK_FIELDS}
        options.student_conf |= {**stacks, "num_encoder_layers": (1, 1, 1)}
    return options


def allocated_peak(events: list) -> int:
    """The most bytes that torch's allocator held at once."""
    now = peak = 0
    memory = [e for e in events if e.name() == "[memory]"]
    for event in sorted(memory, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("size", ["mini", "base"])
def test_memory_is_that_of_a_real_step(size: str) -> None:
    options = options_of(size)
    batch = options, 2, 1.0
    checkpointing = size == "mini"
    planned = spear_plan.simulate(options, checkpointing, *batch[1:])
    random.seed(0)
    with (
        simulate.as_on_a_gpu(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        model, optimizers = spear_plan.build(options, checkpointing)
        simulate.first_update(model, optimizers)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.use_amp):
            loss = model(**spear_plan.make_batch(*batch))[0]
        loss.sum().backward()
    real = allocated_peak(profiler.profiler.kineto_results.events())
    # With bfloat16 a CPU's convolutions make copies of their own.
    lasting = 0 if options.use_amp else planned.lasting
    expected = pytest.approx(real - lasting, rel=0.06 if options.use_amp else 0.02)
    assert planned.peak - lasting == expected
    parameters = list(model.parameters())
    gradients = 4 * sum(p.numel() for p in parameters if p.requires_grad)
    assert planned.gradients == gradients
    assert planned.optimizer == pytest.approx(2 * gradients, rel=0.01)
    weights = 4 * sum(p.numel() for p in [*parameters, *model.buffers()])
    assert planned.weights == pytest.approx(weights, rel=0.01)


def test_table_of_a_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = simulate.StepCosts(*(2**30 * n for n in (1, 1, 2, 20, 1, 4)), 3e14)
    monkeypatch.setattr(spear_plan, "simulate", lambda *args: costs)
    command = ["--config", str(MINI), "--gpu", "a100-40", "--num_gpus", "2"]
    command += ["--share", "0.5", "--", "--batch_bins", "19200000"]
    spear_plan.main(command)
    head, _, plain, _, _, note = capsys.readouterr().out.splitlines()
    cells = [line.strip("| ").split(" | ") for line in (head, plain)]
    row = dict(zip(*cells, strict=True))
    assert row["fits"] == "yes" and row["GiB in all"] == "29.03"
    # 36 GiB to be used, less 4.03 that last, at 25 GiB for 600 s of each of two GPUs.
    assert int(row["largest batch_bins"]) == pytest.approx(
        31.97 / 25 * 19.2e6, rel=1e-3
    )
    assert float(row["x real time"]) == pytest.approx(1200 / (3 / 19.5 * 200), abs=1)
    assert note.startswith("2 x a100-40: 36.0 of 40 GiB each, 50% of the peak")


@pytest.mark.parametrize(
    "words, match",
    [
        (["--gpu", "h1000"], "name one of h200, h100"),
        (["--gpu", "0.1 GB"], "not one utterance of 2.12 s fits.*larger GPU"),
        (["--gpu", "h100", "--num_gpus", "0"], "--num_gpus"),
        (["--gpu", "h100", "--share", "30"], "--share"),
    ],
)
def test_what_cannot_be_planned(
    monkeypatch: pytest.MonkeyPatch, words: list[str], match: str
) -> None:
    costs = simulate.StepCosts(2**27, 2**27, 2**28, 2**27, 0, 0, 1e9)
    monkeypatch.setattr(spear_plan, "simulate", lambda *args: costs)
    with pytest.raises(UserError, match=match):
        spear_plan.main(["--config", str(MINI), *words])

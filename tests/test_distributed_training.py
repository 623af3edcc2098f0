"""Training with several real processes (gloo) is training with one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import data_options, end, launch, write_data

pytestmark = pytest.mark.second_env

STEPS = 4
# Utterances of a batch are dealt out in turn: with four ranks the last one has no
# audio in any batch, and so no target for the audio teacher's head.
DOMAINS = ("audio", "speech", "speech", "speech")
COMMON = [
    *("--ngpu", "0", "--num_workers", "0", "--seed", "1", "--student", "tiny"),
    *("--use_tensorboard", "false", "--use_matplotlib", "false"),
    *("--model_conf", "normalize=frames"),
    *("--batch_type", "unsorted", "--batch_size", "8", "--num_iters_per_epoch", "1"),
    *("--max_epoch", str(STEPS), "--keep_nbest_models", "1"),
    *("--optim", "scaledadam", "--optim_conf", "lr=0.02", "--grad_clip", "1e9"),
    *("--scheduler", "eden", "--scheduler_conf", "warmup_batches=0"),
]
# What depends on neither chance nor the utterances beside one.
EXACT = ["--student_conf", "padding=exact", "--student_conf", "regularize=false"]
EXACT += ["--masker_conf", "time_prob=0", "--masker_conf", "channel_prob=0"]
SAMPLED = ["--iterator_type", "task", "--batch_type", "numel", "--batch_bins", "160000"]
# Name -> number of processes and what differs from COMMON.
RUNS = {
    "one": (1, EXACT),
    "two": (2, EXACT),
    # Four machines, as egs2/spear/ssl1/run.sh --num_nodes 4 starts them.
    "four": (4, [*EXACT, "--student_conf", "activation_checkpointing=true"]),
    "summed_one": (1, [*EXACT, "--model_conf", "normalize=sum"]),
    "summed_two": (2, [*EXACT, "--model_conf", "normalize=sum"]),
    "sampled_one": (1, [*EXACT, *SAMPLED, "--sampler_conf", "step_shards=2"]),
    "sampled_two": (2, [*EXACT, *SAMPLED]),
    "sharded_two": (2, [*EXACT, *SAMPLED, "--sampler_conf", "step_shards=2"]),
    # Twice two parts of the steps of which one process does four at once.
    "parts_one": (1, [*EXACT, *SAMPLED, "--sampler_conf", "step_shards=4"]),
    "accumulated_two": (
        2,
        [
            *(*EXACT, *SAMPLED, "--sampler_conf", "step_shards=4", "--accum_grad", "2"),
            *("--batch_bins", "80000", "--num_iters_per_epoch", "2"),
            *("--valid_batch_bins", "160000"),
        ],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with an experiment for each of RUNS."""
    folder = tmp_path_factory.mktemp("distributed")
    data = data_options(write_data(folder, 16, DOMAINS))
    for name, (world, options) in RUNS.items():
        out = folder / name
        out.mkdir()
        cmd = [*COMMON, *data, *options, "--output_dir", str(out)]
        processes = launch(cmd, out, ranks=world, slurm=name == "four")
        codes = end(processes)
        logs = [(out / f"log{rank}").read_text()[-3000:] for rank in range(world)]
        assert codes == [0] * world, f"{name} failed\n" + "\n".join(logs)
    return folder


def curve(exp: Path, name: str = "loss") -> list[float]:
    """A figure of every training step (an epoch has one) and every validation."""
    stats = torch.load(exp / "checkpoint.pth", weights_only=True)["reporter"]["stats"]
    parts = ("train", "valid")
    return [stats[e][part][name] for e in range(1, STEPS + 1) for part in parts]


@pytest.mark.parametrize(
    "one, other",
    [
        ("one", "two"),
        ("one", "four"),
        ("summed_one", "summed_two"),
        ("sampled_one", "sampled_two"),
        ("sampled_one", "sharded_two"),
        ("parts_one", "accumulated_two"),
    ],
)
def test_loss_curve_is_that_of_one_process(folder: Path, one: str, other: str) -> None:
    """The global mean over ranks with different numbers of frames is exact.

    With ``sum`` that of the training is the mean of the ranks' sums, whose scale
    ScaledAdam ignores.
    """
    expected, got = np.array(curve(folder / one)), np.array(curve(folder / other))
    assert expected[1] - expected[-1] > 1e-3 * expected[1]  # it learns something
    if one.startswith("summed"):
        expected[::2] /= RUNS[other][0]
    np.testing.assert_allclose(got, expected, rtol=2e-5)
    for figure in ("mask_ratio", "audio_audio_loss", "audio_audio_acc_unmasked"):
        np.testing.assert_allclose(
            curve(folder / other, figure), curve(folder / one, figure), atol=1e-3
        )


def test_accumulation_on_two_ranks_ends_with_the_same_parameters(folder: Path) -> None:
    one, other, differently = (
        torch.load(folder / name / f"{STEPS}epoch.pth", weights_only=True)
        for name in ("parts_one", "accumulated_two", "sampled_one")
    )
    torch.testing.assert_close(other, one, rtol=0, atol=2e-5)
    # Trained from the same beginning with other steps.
    away = [(one[k] - v).abs().max() for k, v in differently.items() if v.numel()]
    assert sum(distance > 1e-4 for distance in away) > 100


def test_says_what_steps_depend_on(folder: Path) -> None:
    text = "sampler_conf.step_shards is not set"
    warned = [p for p in folder.glob("*/log?") if text in p.read_text()]
    assert warned == [folder / "sampled_two" / "log0"]
    (line,) = (x for x in warned[0].read_text().splitlines() if text in x)
    assert "WARNING" in line
    assert "2 ranks times accum_grad=1" in line
    # What it tells to set gives the same curve, see above.
    assert "--sampler_conf step_shards=2 keeps" in line

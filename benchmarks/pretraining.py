#!/usr/bin/env python3
"""A training step: its speed, use of the device, memory, and where its time goes.

The same student, batches and masks are trained by this package ("ours", with the
options given) and the plain way ("plain", see plain_espnet.py), in float32 and with
ESPnet's --use_amp; each variant in a process of its own, the processes in turn. On a
GPU it is an error if ours lets the host wait for the device within a step.

    python benchmarks/pretraining.py --device cuda --compile
    python benchmarks/pretraining.py --sizes mini base --seconds 20 --num_threads 2
    python benchmarks/pretraining.py --sizes large --seconds 20 --steps 2 --split false

Batches are random audio and codes: nothing is read from files.
"""

from __future__ import annotations

import argparse
import statistics
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from measure import fresh, kept_bytes, product_rate, read_peak, reset_peak, synchronize
from torch import Tensor, nn

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.explain import add_options, option_parser
from espnet2_spear.fileio.tables import markdown_table

TEACHERS = {
    "speech": {"num_codebooks": 16, "codebook_size": 256, "frame_rate": 50.0},
    "audio": {"num_codebooks": 8, "codebook_size": 256, "frame_rate": 25.0},
}
# Audio (seconds) of a batch on a GPU, as published.
BATCH_SECONDS = {"base": 400.0, "large": 300.0, "xlarge": 300.0}


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = option_parser(__doc__)
    flag = {"type": lambda x: x.lower() in ("true", "1", "yes"), "metavar": "BOOL"}
    parser.add_argument("--sizes", nargs="+", default=["base", "large", "xlarge"])
    add_options(parser, device="cpu", num_threads=2, seed=0)
    parser.add_argument("--seconds", type=float, help="of a batch [by size]")
    parser.add_argument("--utterance_seconds", type=float, default=10.0, help="longest")
    parser.add_argument("--steps", type=int, default=5, help="measured, per process")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each kind")
    parser.add_argument("--variants", nargs="*", default=["ours", "plain", "plain amp"])
    parser.add_argument("--amp", help="bfloat16, float16 or none [bfloat16 on a GPU]")
    parser.add_argument("--compile", nargs="?", const=True, default=False, **flag)
    parser.add_argument("--checkpointing", nargs="?", const=True, default=False, **flag)
    parser.add_argument("--regularize", default=True, help="of the student", **flag)
    parser.add_argument("--split", default=True, help="time by part", **flag)
    parser.add_argument(
        "--peak_tflops",
        type=float,
        help="of the device in the format of matrix products; without it measured by "
        "a product of 8192 x 8192 (GPU) or 2048 x 2048 matrices",
    )
    return parser


def main(cmd: list[str] | None = None) -> None:
    """Measure; see ``--help``."""
    args = get_parser().parse_args(cmd)
    if args.amp is None:
        args.amp = "bfloat16" if args.device.startswith("cuda") else "none"
    for size in args.sizes:
        job = {**vars(args), "size": size}
        job["seconds"] = args.seconds or BATCH_SECONDS.get(size, 300.0)
        results: dict[str, list[dict]] = {v: [] for v in args.variants}
        for _ in range(args.rounds):
            for variant, runs in results.items():
                runs.append(fresh(run_job, {**job, "variant": variant}))
        operations = fresh(count_operations, job)
        report(size, job, results, operations)


class Clock:
    """Time by part; on a GPU it waits for the device, so only for separate steps.

    Args:
        device: that works.
        active: without, nothing is measured and nothing waits.
    """

    def __init__(self, device: torch.device, active: bool) -> None:
        self.device, self.active = device, active
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = 0.0

    def start(self) -> None:
        """Begin to measure."""
        if self.active:
            synchronize(self.device)
            self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Book the time since the last call under a part."""
        if self.active:
            synchronize(self.device)
            now = time.perf_counter()
            self.seconds[part] += now - self.last
            self.last = now

    def watch(self, model: nn.Module) -> list:
        """Book the parts of a forward pass; returns the hooks."""
        student = model.student
        modules = [(student.fbank, "fbank"), (student.encoder_embed, "embed")]
        modules += [
            (stack, f"stack {i} (1/{getattr(stack, 'factor', 1)})")
            for i, stack in enumerate(student.encoder.encoders)
        ]
        # The masks are what runs between the fbank and the embedding.
        hooks = [
            student.encoder_embed.register_forward_pre_hook(
                lambda *_: self.lap("masks")
            )
        ]
        for module, part in modules:
            hooks.append(
                module.register_forward_hook(lambda *_, part=part: self.lap(part))
            )
        return hooks


@contextmanager
def no_wait(device: torch.device, active: bool) -> Iterator[None]:
    """Make it an error on a GPU that the host waits for the device."""
    if active and device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if active and device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def build(job: dict) -> tuple[nn.Module, torch.optim.Optimizer, torch.dtype | None]:
    """Return model, optimizer and the dtype of autocast."""
    from plain_espnet import PlainModel, PlainScaledAdam

    from espnet2_spear.optimizers.scaled_adam import ScaledAdam
    from espnet2_spear.tasks.spear import SpearTask

    ours = job["variant"] == "ours"
    parser = SpearTask.get_parser()
    options = parser.parse_args(["--teachers", "{}", "--output_dir", "unused"])
    options = Namespace(**vars(options))
    options.teachers, options.student = TEACHERS, job["size"]
    options.student_conf = {"regularize": job["regularize"]}
    if ours and job["checkpointing"]:
        options.student_conf["activation_checkpointing"] = True
    if ours and job["compile"]:
        options.compile = True
    torch.manual_seed(job["seed"])
    model = SpearTask.build_model(options)
    amp = {"ours": job["amp"], "plain": "none"}.get(job["variant"], "bfloat16")
    if not ours:
        model = PlainModel(model)
    model.to(job["device"]).train()
    count = model.student.encoder.count
    if count is not None:
        count.value = 20000.0  # behind most schedules: a usual step
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = (ScaledAdam if ours else PlainScaledAdam)(parameters, lr=0.01)
    return model, optimizer, None if amp == "none" else getattr(torch, amp)


def make_batch(job: dict, step: int) -> dict[str, Tensor]:
    """Random utterances between 0.8 and 1 of the longest, half of them audio."""
    generator = torch.Generator().manual_seed(1000 * job["seed"] + step)
    utts = max(1, round(job["seconds"] / job["utterance_seconds"]))
    longest = int(SAMPLE_RATE * job["utterance_seconds"])
    lengths = longest - torch.randint(0, longest // 5, (utts,), generator=generator)
    lengths[0] = longest
    batch = {
        "speech": 0.1 * torch.randn(utts, longest, generator=generator),
        "speech_lengths": lengths,
        "domain": torch.arange(utts)[:, None] % 2,
    }
    for name, conf in TEACHERS.items():
        frames = int(longest / SAMPLE_RATE * conf["frame_rate"])
        shape = (utts, frames, conf["num_codebooks"])
        batch[f"codes_{name}"] = torch.randint(0, 256, shape, generator=generator)
    return {k: v.to(job["device"]) for k, v in batch.items()}


def run_job(job: dict) -> dict:
    """Measure one variant; runs in the child process."""
    torch.set_num_threads(job["num_threads"])
    device = torch.device(job["device"])
    model, optimizer, amp = build(job)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    # Of ours, but for the scaler of float16, which looks at the gradients by itself.
    strict = job["variant"] == "ours" and amp is not torch.float16

    def step(index: int, clock: Clock) -> None:
        batch = make_batch(job, index % 4)
        torch.manual_seed(index)  # the same masks and draws in all variants
        synchronize(device)
        begin = time.perf_counter()
        hooks = clock.watch(model) if clock.active else []
        clock.start()
        with no_wait(device, strict and not clock.active and bool(times)):
            with torch.autocast(device.type, amp, enabled=amp is not None):
                loss = model(**batch)[0].sum()
            clock.lap("heads, loss")
            for hook in hooks:
                hook.remove()
            scaler.scale(loss).backward()
            clock.lap("backward")
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        # The one look of a step at the device.
        if not bool(norm.isfinite()):  # ESPnet looks at it before every step
            raise SystemExit("gradients are not finite")
        clock.lap("norm")
        with no_wait(device, strict and not clock.active and bool(times)):
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        clock.lap("optimizer")
        synchronize(device)
        times.append(time.perf_counter() - begin)
        frames.append(int(model.student.output_lengths(batch["speech_lengths"]).sum()))

    times: list[float] = []
    frames: list[int] = []
    silent = Clock(device, False)
    for index in range(job["warmup"]):
        step(index, silent)
    del times[:], frames[:]
    if device.type == "cuda":  # of a CPU the whole process counts
        reset_peak(device)
    for index in range(job["steps"]):
        step(index, silent)
    result = {"times": list(times), "frames": statistics.mean(frames)}
    result["peak"] = read_peak(device)
    if job["split"]:
        clock = Clock(device, True)
        for index in range(job["steps"]):
            step(index, clock)
        result["split"] = {k: v / job["steps"] for k, v in clock.seconds.items()}
    return result


def count_operations(job: dict) -> dict[str, float]:
    """Operations of a step's matrix products and convolutions, and what it keeps.

    Returns:
        ``counted``: by FlopCounterMode, forward and backward, without regularisers, in
        PyTorch's own operations, which are all that it knows; ``kept`` and
        ``kept_checkpointing``: bytes for the backward pass; ``peak``: FLOP/s.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from espnet2_spear.train.simulate import convolution_backward
    from espnet2_spear.zipformer.cpu import use_cpu_versions

    torch.set_num_threads(job["num_threads"])
    plain = {"variant": "ours", "regularize": False, "compile": False}
    model, _, _ = build({**job, **plain, "checkpointing": False})
    batch = make_batch(job, 0)
    use_cpu_versions(False)
    mapping = {torch.ops.aten.convolution_backward: convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(**batch)[0].sum().backward()
    use_cpu_versions()
    device, amp = torch.device(job["device"]), job["amp"]
    dtype = torch.float32 if amp == "none" else getattr(torch, amp)
    kept = {}
    for checkpointing in (False, True):
        for module in model.student.modules():
            if hasattr(module, "checkpointing"):
                module.checkpointing = checkpointing
        with torch.autocast(device.type, dtype, enabled=amp != "none"):
            with kept_bytes(model.parameters()) as sizes:
                loss = model(**batch)[0]
        kept[checkpointing] = sum(sizes.values())
        del loss
    peak = job["peak_tflops"]
    return {
        "kept": kept[False],
        "kept_checkpointing": kept[True],
        "counted": counter.get_total_flops(),
        "peak": peak * 1e12 if peak else product_rate(device, dtype),
        "parameters": sum(p.numel() for p in model.student.parameters()),
    }


def report(
    size: str, job: dict, results: dict[str, list[dict]], operations: dict
) -> None:
    """Print a table of the variants, and of the parts of a step."""
    counted, peak = operations["counted"], operations["peak"]
    print(
        f"\n## {size}: {job['seconds']:g} s a batch of at most "
        f"{job['utterance_seconds']:g} s, {job['device']}, ours: amp {job['amp']}, "
        f"compile {job['compile']}, activation checkpointing {job['checkpointing']}\n"
    )
    print(
        f"{operations['parameters'] / 1e6:.1f} M parameters; operations of a step: "
        f"{counted / 1e12:.3f} T; peak {peak / 1e12:.3f} TFLOP/s "
        f"({'given' if job['peak_tflops'] else 'measured'}); kept for the backward "
        f"pass {operations['kept'] / 2**30:.2f} GiB, with activation checkpointing "
        f"{operations['kept_checkpointing'] / 2**30:.2f} (amp {job['amp']})\n"
    )
    print(
        "| variant | step, s: median (min to max) | frames/s | x real time "
        "| utilisation | peak memory, GiB | optimizer |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    for variant, runs in results.items():
        times = [t for run in runs for t in run["times"]]
        median, frames = statistics.median(times), runs[0]["frames"]
        share = "-"
        if job["split"]:
            parts = runs[0]["split"]
            share = f"{parts['optimizer'] / sum(parts.values()):.1%}"
        memory = statistics.median(r["peak"] for r in runs) / 2**30
        print(
            f"| {variant} | {median:.3f} ({min(times):.3f} to {max(times):.3f}) "
            f"| {frames / median:.0f} | {frames / median / 50:.1f} "
            f"| {counted / (peak * median):.1%} "
            f"| {memory:.2f} | {share} |"
        )
    if not job["split"] or not results:
        return
    rows = []
    for name in next(iter(results.values()))[0]["split"]:
        parts = [[run["split"][name] for run in runs] for runs in results.values()]
        rows.append([name, *(f"{statistics.median(part):.4f}" for part in parts)])
    print("\n" + markdown_table(["part of a step, s", *results], rows))


if __name__ == "__main__":
    main()

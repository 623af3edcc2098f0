#!/usr/bin/env python3
"""A training step: its speed, use of the device, memory, and where its time goes.

The same student, batches and masks are trained by this package ("ours", with the
options given) and the plain way ("plain", see plain_espnet.py), in float32 and with
ESPnet's --use_amp; each variant in a process of its own, the processes in turn.

    python benchmarks/pretraining.py --device cuda --compile
    python benchmarks/pretraining.py --sizes mini base --seconds 20 --num_threads 2
    python benchmarks/pretraining.py --sizes large --seconds 20 --steps 2 --split false

Batches are random audio and codes: nothing is read from files.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections import defaultdict

import torch
from torch import Tensor, nn

TEACHERS = {
    "speech": {"num_codebooks": 16, "codebook_size": 256, "frame_rate": 50.0},
    "audio": {"num_codebooks": 8, "codebook_size": 256, "frame_rate": 25.0},
}
# Audio (seconds) of a batch on a GPU, as published.
BATCH_SECONDS = {"base": 400.0, "large": 300.0, "xlarge": 300.0}


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = {"type": lambda x: x.lower() in ("true", "1", "yes"), "metavar": "BOOL"}
    parser.add_argument("--sizes", nargs="+", default=["base", "large", "xlarge"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, help="of a batch [by size]")
    parser.add_argument("--utterance_seconds", type=float, default=10.0, help="longest")
    parser.add_argument("--steps", type=int, default=5, help="measured, per process")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each kind")
    parser.add_argument("--variants", nargs="*", default=["ours", "plain", "plain amp"])
    parser.add_argument("--amp", help="bfloat16, float16 or none [bfloat16 on a GPU]")
    parser.add_argument("--compile", nargs="?", const=True, default=False, **flag)
    parser.add_argument("--checkpointing", nargs="?", const=True, default=False, **flag)
    parser.add_argument("--regularize", default=True, help="[true]", **flag)
    parser.add_argument("--split", default=True, help="time by part [true]", **flag)
    parser.add_argument("--num_threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--peak_tflops",
        type=float,
        help="of the device in the format of matrix products; without it measured by "
        "a product of 8192 x 8192 (GPU) or 2048 x 2048 matrices",
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)  # of a child process
    return parser


def main(cmd: list[str] | None = None) -> None:
    """Measure; see ``--help``."""
    args = get_parser().parse_args(cmd)
    if args.job:
        print(json.dumps(run_job(json.loads(args.job))))
        return
    if args.amp is None:
        args.amp = "bfloat16" if args.device.startswith("cuda") else "none"
    for size in args.sizes:
        job = {**vars(args), "size": size}
        job["seconds"] = args.seconds or BATCH_SECONDS.get(size, 300.0)
        results: dict[str, list[dict]] = {v: [] for v in args.variants}
        for _ in range(args.rounds):
            for variant, runs in results.items():
                runs.append(run_child({**job, "variant": variant}))
        operations = run_child({**job, "variant": "operations"})
        report(size, job, results, operations)


def run_child(job: dict) -> dict:
    """Measure a variant in a new process."""
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr[-4000:])
        sys.exit(f"{job['size']}, {job['variant']}: failed")
    return json.loads(done.stdout.splitlines()[-1])


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
            (stack, f"stack {i} (1/{stack_factor(stack)})")
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


def stack_factor(stack: nn.Module) -> int:
    """Downsampling factor of a stack."""
    return getattr(stack, "factor", 1)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    longest = int(16000 * job["utterance_seconds"])
    lengths = longest - torch.randint(0, longest // 5, (utts,), generator=generator)
    lengths[0] = longest
    batch = {
        "speech": 0.1 * torch.randn(utts, longest, generator=generator),
        "speech_lengths": lengths,
        "domain": torch.arange(utts)[:, None] % 2,
    }
    for name, conf in TEACHERS.items():
        frames = int(longest / 16000 * conf["frame_rate"])
        shape = (utts, frames, conf["num_codebooks"])
        batch[f"codes_{name}"] = torch.randint(0, 256, shape, generator=generator)
    return {k: v.to(job["device"]) for k, v in batch.items()}


def run_job(job: dict) -> dict:
    """Measure one variant; runs in the child process."""
    torch.set_num_threads(job["num_threads"])
    device = torch.device(job["device"])
    if job["variant"] == "operations":
        return count_operations({**job, "variant": "ours", "regularize": False})
    model, optimizer, amp = build(job)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)

    def step(index: int, clock: Clock) -> None:
        batch = make_batch(job, index % 4)
        torch.manual_seed(index)  # the same masks and draws in all variants
        synchronize(device)
        begin = time.perf_counter()
        hooks = clock.watch(model) if clock.active else []
        clock.start()
        with torch.autocast(device.type, amp, enabled=amp is not None):
            loss = model(**batch)[0].sum()
        clock.lap("heads, loss")
        for hook in hooks:
            hook.remove()
        scaler.scale(loss).backward()
        clock.lap("backward")
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        if not bool(norm.isfinite()):  # ESPnet looks at it before every step
            raise SystemExit("gradients are not finite")
        clock.lap("norm")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        clock.lap("optimizer")
        synchronize(device)
        times.append(time.perf_counter() - begin)
        frames.append(batch_frames(model, batch))

    times: list[float] = []
    frames: list[int] = []
    silent = Clock(device, False)
    for index in range(job["warmup"]):
        step(index, silent)
    del times[:], frames[:]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for index in range(job["steps"]):
        step(index, silent)
    result = {"times": list(times), "frames": statistics.mean(frames)}
    if device.type == "cuda":
        result["peak"] = torch.cuda.max_memory_allocated()
    else:
        result["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if job["split"]:
        clock = Clock(device, True)
        for index in range(job["steps"]):
            step(index, clock)
        result["split"] = {k: v / job["steps"] for k, v in clock.seconds.items()}
    return result


def batch_frames(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Output frames of a batch, without padding."""
    return int(model.student.output_lengths(batch["speech_lengths"]).sum())


def count_operations(job: dict) -> dict[str, float]:
    """Operations of a step's matrix products and convolutions, counted in two ways.

    Returns:
        ``counted``: by FlopCounterMode, forward and backward, without regularisers, in
        PyTorch's own operations, which are all that it knows;
        ``analytic``: 6 x weights x the frames that they see (padding included), of the
        student's layers and heads: no attention scores, no embedding.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from espnet2_spear.train.simulate import convolution_backward
    from espnet2_spear.zipformer.cpu import use_cpu_versions

    model, _, _ = build({**job, "compile": False, "checkpointing": False})
    student, batch = model.student, make_batch(job, 0)
    use_cpu_versions(False)
    mapping = {torch.ops.aten.convolution_backward: convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(**batch)[0].sum().backward()
    use_cpu_versions()
    utts, samples = batch["speech"].shape
    frames = utts * student.hidden_lengths(samples)
    seen = 0
    for stack in student.encoder.encoders:
        weights = sum(
            p.numel() for n, p in stack.named_parameters() if n.endswith("weight")
        )
        seen += weights * frames / stack_factor(stack)
    heads = sum(p.numel() for p in model.heads.parameters() if p.dim() > 1)
    seen += heads * utts * student.output_lengths(samples)
    device, amp = torch.device(job["device"]), job["amp"]
    dtype = torch.float32 if amp == "none" else getattr(torch, amp)
    peak = job["peak_tflops"]
    kept = {}
    for checkpointing in (False, True):
        for module in student.modules():
            if hasattr(module, "checkpointing"):
                module.checkpointing = checkpointing
        with torch.autocast(device.type, dtype, enabled=amp != "none"):
            kept[checkpointing] = kept_bytes(model, batch)
    return {
        "kept": kept[False],
        "kept_checkpointing": kept[True],
        "counted": counter.get_total_flops(),
        "analytic": 6.0 * float(seen),
        "peak": peak * 1e12 if peak else product_rate(device, dtype),
        "parameters": sum(p.numel() for p in student.parameters()),
    }


def kept_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, besides parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(**batch)[0]
    del loss
    return sum(kept.values())


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of five."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def report(
    size: str, job: dict, results: dict[str, list[dict]], operations: dict
) -> None:
    """Print a table of the variants, and of the parts of a step."""
    counted, analytic, peak = (operations[k] for k in ("counted", "analytic", "peak"))
    print(
        f"\n## {size}: {job['seconds']:g} s a batch of at most "
        f"{job['utterance_seconds']:g} s, {job['device']}, ours: amp {job['amp']}, "
        f"compile {job['compile']}, activation checkpointing {job['checkpointing']}\n"
    )
    print(
        f"{operations['parameters'] / 1e6:.1f} M parameters; operations of a step: "
        f"{counted / 1e12:.3f} T counted, {analytic / 1e12:.3f} T by 6 x weights x "
        f"frames; peak {peak / 1e12:.3f} TFLOP/s "
        f"({'given' if job['peak_tflops'] else 'measured'}); kept for the backward "
        f"pass {operations['kept'] / 2**30:.2f} GiB, with activation checkpointing "
        f"{operations['kept_checkpointing'] / 2**30:.2f} (amp {job['amp']})\n"
    )
    print(
        "| variant | step, s: median (min to max) | frames/s | x real time "
        "| utilisation: counted, analytic | peak memory, GiB | optimizer |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    for variant, runs in results.items():
        times = [t for run in runs for t in run["times"]]
        median, frames = statistics.median(times), runs[0]["frames"]
        use = " ".join(f"{x / (peak * median):.1%}" for x in (counted, analytic))
        share = "-"
        if job["split"]:
            parts = runs[0]["split"]
            share = f"{parts['optimizer'] / sum(parts.values()):.1%}"
        memory = statistics.median(r["peak"] for r in runs) / 2**30
        print(
            f"| {variant} | {median:.3f} ({min(times):.3f} to {max(times):.3f}) "
            f"| {frames / median:.0f} | {frames / median / 50:.1f} | {use} "
            f"| {memory:.2f} | {share} |"
        )
    if not job["split"] or not results:
        return
    print("\n| part of a step, s | " + " | ".join(results) + " |")
    print("|---|" + "--:|" * len(results))
    for name in next(iter(results.values()))[0]["split"]:
        row = [statistics.median(r["split"][name] for r in v) for v in results.values()]
        print(f"| {name} | " + " | ".join(f"{x:.4f}" for x in row) + " |")


if __name__ == "__main__":
    main()

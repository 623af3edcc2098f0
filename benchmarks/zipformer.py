#!/usr/bin/env python3
"""Speed and peak memory of our Zipformer and of the public package zipformer 0.1.3.

Both encode the same features with the same weights; every measurement is a process of
its own, and the two implementations take turns, so that neither gains from a quiet
moment. The package asks for an older torch: unpack it and the light packages that it
imports into a folder of their own, which only the peer's process sees, and both run on
the same torch:

    uv pip install --no-deps --target peer zipformer==0.1.3 atdataset kaldialign \\
        kaldifst simple-sentencepiece webdataset braceexpand modelscope \\
        onnxconverter_common
    python benchmarks/zipformer.py --peer_path peer --num_threads 2

Without --peer_path ours is measured alone. The peer's count of batches is set behind
most schedules, as is ours.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from measure import fresh, in_turn, read_peak, reset_peak, resident, timed

from espnet2_spear.fileio.explain import add_options, option_parser

MODES = ("inference", "training")
BATCHES_DONE = 20000.0  # count that the schedules of training are set to
COMPILED_STEPS = 10  # in which graphs are made, and that do not count


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = option_parser(__doc__)
    add_options(parser, size="base", utterances=4, num_threads=2, device="cpu")
    add_options(parser, peer_path="")
    parser.add_argument(
        "--conf",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="of the student, in YAML: activation_checkpointing=true, causal=true",
    )
    parser.add_argument("--seconds", type=float, default=15.0, help="of each")
    parser.add_argument(
        "--trials",
        type=int,
        default=5,
        help="per process; 0: the first step, which else does not count",
    )
    parser.add_argument("--rounds", type=int, default=2, help="processes of each kind")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="ours: the chains of training, as spear_train does; inference as a whole",
    )
    parser.add_argument("--peak_tflops", type=float, help="of the device, for its use")
    return parser


def main(cmd=None):
    """Measure; see ``--help``."""
    args = get_parser().parse_args(cmd)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        config = save_weights(args, weights)
        shared = {**vars(args), "config": config, "weights": str(weights)}
        names = ["ours", "peer"] if args.peer_path else ["ours"]
        for mode in args.modes:
            results: dict[str, list[dict]] = {name: [] for name in names}
            for _ in range(args.rounds):
                for name in names:
                    job = {**shared, "mode": mode, "name": name}
                    results[name].append(fresh(run_job, job))
            report(mode, results, args)
    if args.device == "cpu":
        mkl, onednn = fresh(product_rates, args.num_threads)
        print(f"a product of matrices: MKL {mkl:.2f}, oneDNN {onednn:.2f} TFLOP/s")


def product_rates(num_threads: int) -> tuple[float, float]:
    """TFLOP/s of torch's own product, which the peer uses, and of oneDNN's."""
    from espnet2_spear.torch_private import onednn_linear

    torch.set_num_threads(num_threads)
    x, weight = torch.randn(3000, 512), torch.randn(1536, 512)
    work = {
        "mkl": lambda: torch.nn.functional.linear(x, weight),
        "onednn": lambda: onednn_linear(x, weight, None, "none", [], ""),
    }
    flops = 2 * x.numel() * len(weight)
    mkl, onednn = (
        flops / statistics.median(times) / 1e12 for times in in_turn(work, 20).values()
    )
    return mkl, onednn


def save_weights(args: argparse.Namespace, path: Path) -> dict:
    """Write random weights that both load; return the configuration."""
    from espnet2_spear.spear.student import SpearEncoder
    from espnet2_spear.zipformer.config import ZipformerConfig

    torch.manual_seed(0)
    config = ZipformerConfig.from_dict(
        {
            "name": args.size,
            "output_downsampling_factor": 2,  # the peer knows no other
            "regularize": True,
            "regularize_start": BATCHES_DONE,
            **dict(_pair(setting) for setting in args.conf),
        }
    ).to_dict()
    student = SpearEncoder(ZipformerConfig.from_dict(config))
    torch.save(student.state_dict(), path)
    return config


def _pair(setting: str) -> tuple[str, object]:
    key, _, value = setting.partition("=")
    return key, yaml.safe_load(value)


def run_job(job: dict) -> dict:
    """Measure one implementation in one mode; runs in the child process."""
    torch.set_num_threads(job["num_threads"])
    device = torch.device(job["device"])
    training = job["mode"] == "training"
    encode, modules = (build_ours if job["name"] == "ours" else build_peer)(job)
    for module in modules:
        module.to(device).train(training)
    generator = torch.Generator().manual_seed(1)
    frames = int(job["seconds"] * 100)
    shape = (job["utterances"], frames, job["config"]["num_mel_bins"])
    fbank = (torch.randn(shape, generator=generator) * 3 - 8).to(device)
    lens = torch.full((len(fbank),), frames, device=device)

    def step() -> torch.Tensor:
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=job["bf16"])
        with autocast, contextlib.nullcontext() if training else torch.no_grad():
            out = encode(fbank, lens)
        if training:
            out.float().square().mean().backward()
            for module in modules:
                module.zero_grad(set_to_none=True)
        return out.detach()

    held = resident() if device.type == "cpu" else 0
    if job["trials"]:
        out = step()  # the first one does not count
    for _ in range(COMPILED_STEPS if job["compile"] else 0):
        step()
    reset_peak(device)
    times, used = [], time.process_time()
    for _ in range(max(1, job["trials"])):
        seconds, out = timed(step, device)
        times.append(seconds)
    result = {
        "times": times,
        "cpu": (time.process_time() - used) / len(times),
        "peak": read_peak(device),
        "held": held,
        "sum": float(out.double().abs().mean()),
    }
    if job["name"] == "ours":
        result["flops"] = count_flops(job, fbank.cpu(), lens.cpu(), training)
    return result


def count_flops(job: dict, fbank, lens, training: bool) -> int:
    """Operations of the model: of the plain forward pass, times 3 for training.

    What is computed twice to save memory does not count, nor does what the counter
    makes of the backward pass of grouped convolutions (a hundred times too much).
    """
    from torch.utils.flop_counter import FlopCounterMode

    from espnet2_spear.zipformer import scores

    scores.MAX_WEIGHTS = fbank.numel() ** 2  # blocks are not counted
    # Without memory and without computing anything.
    student, frames = _student(job).eval().to("meta"), fbank[:1].to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        student.encode(frames, lens[:1])
    return counter.get_total_flops() * len(fbank) * (3 if training else 1)


def build_ours(job: dict):
    """Return a function of features and lengths, and the modules it uses."""
    torch.set_flush_denormal(True)
    student = _student(job)
    encode = student.encode
    if job["compile"] and job["mode"] == "training":
        from espnet2_spear.zipformer.fusion import fuse_chains

        if not fuse_chains():  # as spear_train --compile true
            sys.exit("torch.compile does not work here, see above; leave --compile out")
    elif job["compile"]:
        encode = torch.compile(encode)
    # The peer gives no hidden states either.
    return lambda x, lens: encode(x, lens, False).encoder_out, [student]


def _student(job: dict):
    from espnet2_spear.spear.student import SpearEncoder
    from espnet2_spear.zipformer.config import ZipformerConfig

    student = SpearEncoder(ZipformerConfig.from_dict(job["config"]))
    student.load_state_dict(torch.load(job["weights"], weights_only=True))
    return student


def build_peer(job: dict):
    """Return the same of the public package."""
    # This script has the package's name, and its folder comes first.
    here = Path(__file__).resolve().parent
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != here]
    sys.path.insert(0, job["peer_path"])
    from zipformer.modules.scaling import ScheduledFloat
    from zipformer.modules.subsampling import Conv2dSubsampling
    from zipformer.modules.zipformer import Zipformer

    torch.set_flush_denormal(True)
    config = job["config"]
    per_stack = (
        "downsampling_factor",
        "num_encoder_layers",
        "feedforward_dim",
        "encoder_dim",
        "encoder_unmasked_dim",
        "cnn_module_kernel",
        "num_heads",
    )
    dropout = ScheduledFloat((0.0, 0.3), (20000.0, 0.1))
    embed = Conv2dSubsampling(
        config["num_mel_bins"], config["encoder_dim"][0], dropout=dropout
    )
    encoder = Zipformer(
        output_downsampling_factor=2,
        pos_dim=config["pos_dim"],
        query_head_dim=config["query_head_dim"],
        pos_head_dim=config["pos_head_dim"],
        value_head_dim=config["value_head_dim"],
        **{k: tuple(config[k]) for k in per_stack},
    )
    state = torch.load(job["weights"], weights_only=True)
    for prefix, module in (("encoder_embed.", embed), ("encoder.", encoder)):
        own = {
            k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)
        }
        # Only the unused vector of every layer may be absent on one side.
        missing, extra = module.load_state_dict(own, strict=False)
        odd = [k for k in (*missing, *extra) if not k.endswith("bypass_scale")]
        if odd:
            raise RuntimeError(f"the peer's parameters differ: {odd[:5]}")
        for child in module.modules():
            if hasattr(child, "batch_count"):
                child.batch_count = BATCHES_DONE

    def encode(x: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
        x, lens = embed(x, lens)
        padding = torch.arange(x.size(1), device=x.device) >= lens[:, None]
        out, _ = encoder(x.transpose(0, 1), lens, padding)
        return out.transpose(0, 1)

    return encode, [embed, encoder]


def report(mode: str, results: dict[str, list[dict]], args) -> None:
    """Print medians, peak memory, ratios and the share of the device's peak."""
    medians, peaks, steps = {}, {}, {}
    for name, runs in results.items():
        times = [t for r in runs for t in r["times"]]
        medians[name] = statistics.median(times)
        peaks[name] = statistics.median(r["peak"] for r in runs)
        steps[name] = statistics.median(r["peak"] - r["held"] for r in runs)
        print(
            f"{mode} {name}: median {medians[name]:.3f} s of {len(times)}, "
            f"from {min(times):.3f} to {max(times):.3f}; "
            f"{statistics.median(r['cpu'] for r in runs):.2f} s of a core; "
            f"peak {peaks[name] / 2**30:.2f} GiB, {steps[name] / 2**30:.2f} of it "
            f"above torch and weights; mean |out| {runs[0]['sum']:.6f}"
        )
    flops = results["ours"][0].get("flops")
    if flops:
        rate = flops / medians["ours"] / 1e12
        print(f"  {flops / 1e12:.3f} TFLOP, {rate:.3f} TFLOP/s", end="")
        if args.peak_tflops:
            print(f", {100 * rate / args.peak_tflops:.1f} % of the peak", end="")
        print()
    if "peer" in results:
        print(
            f"  {medians['peer'] / medians['ours']:.2f} times as fast, "
            f"{peaks['ours'] / peaks['peer']:.2f} of the peak memory, "
            f"{steps['ours'] / steps['peer']:.2f} of what is above torch and weights"
        )


if __name__ == "__main__":
    main()

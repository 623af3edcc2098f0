#!/usr/bin/env python3
"""An exported student: size and speed of onnxruntime beside ours, and what 8 bits cost.

    python benchmarks/export.py --size base --num_threads 2
    python benchmarks/export.py --student EXP/latest.pth --wav_scp WAV_SCP

Without --student weights are random (seed 0), and without --wav_scp the audio is noise:
sizes and times are the same, errors of 8 bits are not.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import soundfile
import torch
from torch import Tensor

from espnet2_spear.hub.graph import write_graph
from espnet2_spear.hub.graph_student import offline_student
from espnet2_spear.hub.load import load_model
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import ZipformerConfig

RATE = 16000


def read(wav_scp: Path | None, samples: int) -> Tensor:
    """One utterance (1, samples): the recordings one after the other, or noise."""
    if wav_scp is None:
        return torch.randn(1, samples) * 0.1
    pieces: list[np.ndarray] = []
    paths = [line.split()[1] for line in wav_scp.read_text().splitlines()]
    while sum(map(len, pieces)) < samples:
        pieces += [soundfile.read(path, dtype="float32")[0] for path in paths]
    return torch.from_numpy(np.concatenate(pieces)[:samples])[None]


def seconds(run: Callable[[], object], trials: int) -> float:
    """Median time of a call."""
    run()
    times = []
    for _ in range(trials):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main(cmd: list[str] | None = None) -> None:
    """Export, and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student")
    parser.add_argument("--size", default="base", help="without --student")
    parser.add_argument("--wav_scp", type=Path)
    parser.add_argument("--num_threads", type=int, default=2)
    parser.add_argument("--lengths", type=float, nargs="+", default=[5.0, 20.0])
    parser.add_argument("--trials", type=int, default=5)
    args = parser.parse_args(cmd)
    torch.manual_seed(0)
    torch.set_num_threads(args.num_threads)
    torch.set_flush_denormal(True)
    if args.student:
        model = load_model(args.student)
    else:
        model = SpearEncoder(ZipformerConfig.from_name(args.size)).eval()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.num_threads
    with tempfile.TemporaryDirectory() as folder:
        network = offline_student(model)
        files = write_graph(network, Path(folder), "onnx", int8=True)
        sessions = [onnxruntime.InferenceSession(f, options) for f in files]
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        sizes = [file.stat().st_size for file in files]
    print("| | MB |", *(f"{s:g} s of audio, s |" for s in args.lengths), "error |")
    print("|---|--:|", "--:|" * (len(args.lengths) + 1))
    utterances = [read(args.wav_scp, int(s * RATE)) for s in args.lengths]
    lens = [torch.tensor([x.size(1)]) for x in utterances]
    with torch.inference_mode():
        pairs = [*zip(utterances, lens, strict=True)]
        expected = [model(x, n, False).encoder_out for x, n in pairs]
        times = [
            seconds(lambda x=x, n=n: model(x, n, False), args.trials) for x, n in pairs
        ]
    row("ours", weights, times, 0.0)
    for file, size, session in zip(files, sizes, sessions, strict=True):
        inputs = [{"audio": x.numpy(), "lengths": n.numpy()} for x, n in pairs]
        got = torch.from_numpy(session.run(None, inputs[-1])[0])
        error = (got - expected[-1]).norm() / expected[-1].norm()
        times = [seconds(lambda i=i: session.run(None, i), args.trials) for i in inputs]  # noqa: B023
        row(file.name, size, times, float(error))


def row(name: str, size: int, times: list[float], error: float) -> None:
    """Print a line of the table; error: of the output, relative."""
    cells = " ".join(f"{t:.3f} |" for t in times)
    print(f"| {name} | {size / 1e6:.1f} | {cells} {error:.1e} |", flush=True)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""An exported student: size and speed of onnxruntime beside ours, and what 8 bits cost.

    python benchmarks/export.py --size base --num_threads 2
    python benchmarks/export.py --student EXP/latest.pth --wav_scp WAV_SCP

Without --student weights are random (seed 0), and without --wav_scp the audio is noise:
sizes and times are the same, errors of 8 bits are not.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnxruntime
import torch
from measure import in_turn, read_audio

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.explain import option_parser
from espnet2_spear.hub.graph import write_graph
from espnet2_spear.hub.graph_student import offline_student
from espnet2_spear.hub.load import load_model
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import ZipformerConfig


def main(cmd: list[str] | None = None) -> None:
    """Export, and measure."""
    parser = option_parser(__doc__)
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
    counts = [int(s * SAMPLE_RATE) for s in args.lengths]
    utterances = [torch.randn(1, n) * 0.1 for n in counts]
    if args.wav_scp:
        utterances = [read_audio(args.wav_scp, n) for n in counts]
    lens = [torch.tensor([x.size(1)]) for x in utterances]
    with torch.inference_mode():
        pairs = [*zip(utterances, lens, strict=True)]
        expected = [model(x, n, False).encoder_out for x, n in pairs]
        calls = [partial(model, x, n, False) for x, n in pairs]
        row("ours", weights, calls, 0.0, args.trials)
    for file, size, session in zip(files, sizes, sessions, strict=True):
        inputs = [{"audio": x.numpy(), "lengths": n.numpy()} for x, n in pairs]
        got = torch.from_numpy(session.run(None, inputs[-1])[0])
        error = (got - expected[-1]).norm() / expected[-1].norm()
        calls = [partial(session.run, None, i) for i in inputs]
        row(file.name, size, calls, float(error), args.trials)


def row(name: str, size: int, calls: list[Callable], error: float, trials: int) -> None:
    """Print a line of the table; error: of the output, relative."""
    times = in_turn(dict(enumerate(calls)), trials).values()
    cells = " ".join(f"{statistics.median(values):.3f} |" for values in times)
    print(f"| {name} | {size / 1e6:.1f} | {cells} {error:.1e} |", flush=True)


if __name__ == "__main__":
    main()

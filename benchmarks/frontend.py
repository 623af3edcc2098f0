#!/usr/bin/env python3
"""Long audio in pieces against the whole, and how log-mel lies beside the features.

    python benchmarks/frontend.py --student EXP/latest.pth --wav_scp WAV_SCP

No timing: what it prints does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from measure import MIB, read_audio, read_peak
from torch import Tensor

from espnet2_spear.asr.frontend.spear import SpearFrontend
from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.explain import option_parser

CONTEXTS = (0.0, 1.0, 2.5, 5.0, 10.0, 20.0)


def features(student: str, speech: Tensor, **options) -> Tensor:
    frontend = SpearFrontend(ckpt=student, **options).eval()
    with torch.no_grad():
        return frontend(speech, torch.tensor([speech.size(1)]))[0][0]


def chunk_errors(student: str, speech: Tensor, chunk: float) -> None:
    """Relative difference of the features from those of the whole, by context."""
    whole = features(student, speech)
    seconds = speech.size(1) / SAMPLE_RATE
    print(f"{seconds:.0f} s, {len(whole)} frames, pieces of {chunk:g} s")
    print("context s   all frames   worst frame   frames off by over 10 %")
    for context in CONTEXTS:
        options = {"chunk_seconds": chunk, "context_seconds": context}
        error = features(student, speech, **options) - whole
        frames = error.norm(dim=1) / whole.norm(dim=1)
        print(
            f"{context:>9g}   {error.norm() / whole.norm():10.4f}   "
            f"{frames.max():11.4f}   {100 * (frames > 0.1).float().mean():8.2f} %"
        )


def chunk_memory(student: str, speech: Tensor, hours: float, chunk: float) -> None:
    """Peak memory of this process before and after so much audio, in pieces."""
    times = int(np.ceil(hours * 3600 * SAMPLE_RATE / speech.size(1)))
    long = speech.repeat(1, times)[:, : int(hours * 3600 * SAMPLE_RATE)]
    before = read_peak(speech.device) / MIB
    out = features(student, long, chunk_seconds=chunk, pool=2)
    after = read_peak(speech.device) / MIB
    print(
        f"{hours:g} h: {out.shape[0]} frames of {out.shape[1]}; waveform "
        f"{long.nbytes >> 20} MiB, features {out.nbytes >> 20} MiB; peak of the "
        f"process {before:.0f} MiB before, {after:.0f} MiB after"
    )


def alignment(student: str, speech: Tensor) -> None:
    """Share of the fbank's variance that the features explain, by shift."""
    frontend = SpearFrontend(ckpt=student).eval()
    lengths = torch.tensor([speech.size(1)])
    with torch.no_grad():
        fbank, _ = frontend.upstream.compute_fbank(speech, lengths)
        states = frontend.upstream.encode(fbank, lengths // 160).hidden_states
    valid = fbank[0][fbank[0] > -15.9]
    print(f"log-mel: mean {valid.mean():.2f}, std {valid.std():.2f} (floor left out)")
    print("fbank frame 2 j + d from frame j: share of variance, by layer")
    shifts = range(-8, 17, 2)
    print("layer " + " ".join(f"{d:>5}" for d in shifts))
    for i, x in enumerate(states):
        x = x[0][4:-12].double()
        x = torch.cat([x - x.mean(0), torch.ones(len(x), 1)], dim=1)
        half = len(x) // 2
        line = []
        for d in shifts:
            y = fbank[0][8 + d :: 2][: len(x)].double()
            gram = x[:half].T @ x[:half] + 10 * torch.eye(x.size(1))
            w = torch.linalg.solve(gram, x[:half].T @ y[:half])
            left = (y[half:] - x[half:] @ w).square().sum()
            line.append(1 - left / (y[half:] - y[half:].mean(0)).square().sum())
        print(f"{i:>5} " + " ".join(f"{v:5.2f}" for v in line))


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = option_parser(__doc__)
    parser.add_argument("--student", required=True)
    parser.add_argument("--wav_scp", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=180.0, help="the whole")
    parser.add_argument("--chunk_seconds", type=float, default=30.0)
    parser.add_argument("--hours", type=float, default=1.0, help="memory; 0: not")
    return parser


def main(cmd: list[str] | None = None) -> None:
    """Run all measurements."""
    args = get_parser().parse_args(cmd)
    torch.manual_seed(0)
    speech = read_audio(args.wav_scp, int(args.seconds * SAMPLE_RATE))
    if args.hours > 0:  # first: the peak is that of the whole process
        chunk_memory(args.student, speech, args.hours, args.chunk_seconds)
    chunk_errors(args.student, speech, args.chunk_seconds)
    alignment(args.student, speech)


if __name__ == "__main__":
    main()

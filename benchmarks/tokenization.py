#!/usr/bin/env python3
"""Is the quantizer ever slower than the teacher that feeds it? Both on real audio."""

from __future__ import annotations

import argparse
import statistics

import torch
from measure import timed

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.explain import add_options, option_parser
from espnet2_spear.fileio.tables import markdown_table
from espnet2_spear.fileio.utterances import beside_wav_scp, make_batches
from espnet2_spear.mvq.files import load_quantizer
from espnet2_spear.teachers import build_teacher, load_teacher_config
from espnet2_spear.teachers.embed import embed_batch


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = option_parser(__doc__)
    parser.add_argument("--teacher_config", required=True)
    parser.add_argument("--quantizer", required=True)
    parser.add_argument("--data_dir", required=True, help="formatted, 16 kHz")
    add_options(parser, domain="speech", batch_seconds=20.0, trials=3, device="cpu")
    add_options(parser, num_threads=2)
    parser.add_argument("--seconds", type=float, default=300.0, help="of audio")
    return parser


def main(cmd=None):
    """Measure; see ``--help``. Reading the audio counts to neither of the two."""
    args = get_parser().parse_args(cmd)
    torch.set_num_threads(args.num_threads)
    device = torch.device(args.device)
    teacher = build_teacher(*load_teacher_config(args.teacher_config)).to(device)
    quantizer = load_quantizer(args.quantizer).to(device)
    utterances = beside_wav_scp(f"{args.data_dir}/wav.scp", args.domain)
    chosen, seconds = [], 0.0
    for utterance in utterances:
        if seconds < args.seconds:
            chosen.append(utterance)
            seconds += utterance.samples / SAMPLE_RATE
    batches = make_batches(chosen, args.batch_seconds)
    times: dict[str, list[float]] = {"teacher": [], "quantizer": []}
    forward = teacher.forward
    frames = 0

    def timed_forward(*inputs):
        spent, result = timed(lambda: forward(*inputs), device)
        times["teacher"][-1] += spent
        return result

    teacher.forward = timed_forward
    for _ in range(args.trials + 1):  # the first one does not count
        for values in times.values():
            values.append(0.0)
        frames = 0
        for batch in batches:
            x = torch.cat(embed_batch(teacher, batch).tensors)
            frames += len(x)
            spent, _ = timed(lambda x=x: quantizer.encode(x), device)
            times["quantizer"][-1] += spent
    print(
        f"{len(chosen)} utterances, {seconds:.0f} s of audio, {frames} frames of "
        f"{quantizer.dim}; N={quantizer.num_codebooks}, {quantizer.kind}, {device}, "
        f"{args.num_threads} threads, median of {args.trials}\n"
    )
    medians = {name: statistics.median(v[1:]) for name, v in times.items()}
    rows = [[n, f"{m:.2f}", f"{seconds / m:.0f}"] for n, m in medians.items()]
    print(markdown_table(["", "seconds", "times real time"], rows))
    print(
        f"\nthe quantizer takes {medians['quantizer'] / medians['teacher']:.2f} of the "
        "teacher's time"
    )


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Speed of the fbank: ours in batches beside torchaudio's, utterance by utterance.

Ours runs on --device (--batch 1: one by one, too), torchaudio.compliance.kaldi.fbank
always on the CPU, as data loaders of other recipes do it; the two take turns. Lengths
of the utterances are drawn between half and all of --seconds.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from measure import in_turn
from torchaudio.compliance import kaldi

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.explain import add_options, option_parser
from espnet2_spear.fileio.tables import markdown_table
from espnet2_spear.zipformer.cpu import use_cpu_versions
from espnet2_spear.zipformer.fbank import Fbank


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = option_parser(__doc__)
    parser.add_argument("--device", default="cpu", help="of ours: cpu, cuda, ...")
    add_options(parser, utterances=32, num_mel_bins=128, num_threads=2, trials=7)
    parser.add_argument("--batch", type=int, default=8, help="utterances at once")
    parser.add_argument("--seconds", type=float, default=15.0, help="of the longest")
    return parser


def main(cmd=None):
    """Measure; see ``--help``."""
    args = get_parser().parse_args(cmd)
    torch.set_num_threads(args.num_threads)
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    samples = int(args.seconds * SAMPLE_RATE)
    lengths = torch.randint(
        samples // 2, samples + 1, (args.utterances,), generator=generator
    )
    lengths = lengths.sort().values
    waves = [torch.randn(1, n, generator=generator) * 0.1 for n in lengths.tolist()]
    batches = []
    for start in range(0, args.utterances, args.batch):
        part = [wave[0] for wave in waves[start : start + args.batch]]
        speech = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
        batches.append((speech.to(device), lengths[start : start + args.batch]))
    use_cpu_versions()  # as every student does
    fbank = Fbank(args.num_mel_bins).to(device)

    def ours():
        return [fbank(*batch)[0] for batch in batches]

    def torchaudio():
        return [
            kaldi.fbank(
                wave,
                num_mel_bins=args.num_mel_bins,
                high_freq=-400.0,
                dither=0.0,
                energy_floor=0.0,
                snip_edges=False,
            )
            for wave in waves
        ]

    names = f"ours, {args.batch} at once, {device}", "torchaudio, one by one, cpu"
    times = in_turn(
        dict(zip(names, (ours, torchaudio), strict=True)), args.trials, device
    )
    # Of the longest utterance, which is not padded.
    difference = (ours()[-1][-1, :-2].cpu() - torchaudio()[-1][:-2]).abs().max()
    total = float(lengths.sum()) / SAMPLE_RATE
    print(
        f"{args.utterances} utterances, {total:.0f} s of audio, {args.num_threads} "
        f"threads, median of {args.trials}; largest difference {float(difference):.1e}"
        "\n"
    )
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = [
        [name, f"{1000 * m:.1f}", f"{total / m:,.0f}", f"{medians[names[1]] / m:.2f}"]
        for name, m in medians.items()
    ]
    print(markdown_table(["", "ms", "times real time", "beside torchaudio"], rows))


if __name__ == "__main__":
    main()

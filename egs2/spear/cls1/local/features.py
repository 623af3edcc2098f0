#!/usr/bin/env python3
"""Embed clips by a system and cache what a linear probe needs of it.

Mean and standard deviation over time of every layer: (clips, layers, 2 channels).
Clips are embedded one by one, so that no padding counts, and at most their first 10 s;
shorter ones than 0.5 s are followed by silence.
"""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from espnet2_spear import load_model
from espnet2_spear.fileio.atomic import atomic
from espnet2_spear.fileio.audio import read_audio
from espnet2_spear.fileio.datadir import read_table
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.teachers import build_teacher, load_teacher_config
from espnet2_spear.zipformer.fbank import Fbank

RATE = 16000
SHORTEST, LONGEST = RATE // 2, 10 * RATE  # samples
Embed = Callable[[Tensor], list[Tensor]]


def build(system: str, path: str, seed: int, device: str) -> Embed:
    """Return a function from (1, samples) to the layers, each (frames, channels).

    Args:
        system: logmel; student or random (the student's network, initialised anew),
            with a checkpoint; or teacher, with its YAML.
        path: of the checkpoint or YAML.
        seed: of random.
        device: to compute on.
    """

    def count(speech: Tensor) -> Tensor:
        return torch.tensor([speech.size(1)], device=speech.device)

    if system == "logmel":
        fbank = Fbank().to(device)
        return lambda speech: [fbank(speech, count(speech))[0][0]]
    if system == "teacher":
        teacher = build_teacher(*load_teacher_config(path)).to(device)
        return lambda speech: [teacher(speech, count(speech))[0][0]]
    model = load_model(path)
    if system == "random":
        torch.manual_seed(seed)
        model = SpearEncoder(model.config).eval()
    model = model.to(device)
    return lambda speech: [h[0] for h in model(speech, count(speech)).hidden_states]


def pool(layers: list[Tensor]) -> np.ndarray:
    """Mean and standard deviation over time: (layers, 2 channels)."""
    rows = [
        torch.cat([layer.mean(dim=0), layer.std(dim=0, correction=0)])
        for layer in layers
    ]
    return torch.stack(rows).float().cpu().numpy()


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--system", choices=["logmel", "random", "student", "teacher"], required=True
    )
    parser.add_argument("--path", default="", help="checkpoint, or YAML of a teacher")
    parser.add_argument("--wav_scp", type=Path, required=True, help="16 kHz files")
    parser.add_argument("--seed", type=int, default=0, help="of the system random")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True, help=".npz")
    return parser


@torch.inference_mode()
def main(cmd: list[str] | None = None) -> None:
    """Write the features."""
    args = get_parser().parse_args(cmd)
    embed = build(args.system, args.path, args.seed, args.device)
    features = {}
    for utt, path in read_table(args.wav_scp, "utterance file").items():
        samples, rate = read_audio(path)
        if rate != RATE:
            raise ValueError(f"{path}: is at {rate} Hz; run stage 2 of run.sh again")
        speech = torch.from_numpy(samples[:LONGEST])
        speech = F.pad(speech, (0, max(0, SHORTEST - len(speech))))
        features[utt] = pool(embed(speech[None].to(args.device)))
        if not np.isfinite(features[utt]).all():
            raise ValueError(f"{path}: {args.system} gives values that are not finite")
    with atomic(args.output) as file:
        utts = np.array(list(features))
        np.savez(file, utts=utts, features=np.stack(list(features.values())))
    logging.info("%s: %s", args.output, np.stack(list(features.values())).shape)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="(features.py) %(message)s")
    main()

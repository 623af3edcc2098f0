#!/usr/bin/env python3
"""Time and memory of the recipe's stages 1 to 6 on many short synthetic utterances.

Writes recordings of a minute of modulated noise with Kaldi segments, three of four as
speech, and runs egs2/spear/ssl1/run.sh on them, a stage at a time:

    python benchmarks/recipe_scale.py --utterances 10000 100000 --nj 2

Of every stage it prints the time, the rate, and the largest resident memory that any
one of its processes had. The teachers' packages must be installed (make setup).
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import torch
from measure import fresh, timed

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.explain import add_options, option_parser

RECIPE = Path(__file__).resolve().parent.parent / "egs2/spear/ssl1"
RECORDING = 60  # seconds
STAGES = ("data", "format", "filter", "quantizers", "tokenization", "checks")


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = option_parser(__doc__)
    parser.add_argument("--utterances", type=int, nargs="+", default=[10000, 100000])
    parser.add_argument("--seconds", type=float, default=0.6, help="of an utterance")
    add_options(parser, nj=2, stop_stage=6, seed=0)
    parser.add_argument("--workdir", type=Path, help="kept; by default a temporary one")
    return parser


def noise(rng: np.random.Generator) -> np.ndarray:
    """A recording whose level moves as that of speech does, four times a second."""
    samples = rng.standard_normal(RECORDING * SAMPLE_RATE, dtype=np.float32)
    points = np.arange(RECORDING * 4)
    level = np.interp(
        np.arange(len(samples)) / SAMPLE_RATE * 4,
        points,
        10 ** rng.uniform(-3, -1, len(points)),
    )
    return np.clip(samples * level.astype(np.float32), -1, 1)


def write_corpus(folder: Path, count: int, seconds: float, seed: int) -> None:
    """Write ``speech`` and ``audio``, Kaldi directories that share their recordings."""
    per_recording = int(RECORDING / seconds)
    rng = np.random.default_rng(seed)
    wave = noise(rng)
    for domain, share in (("speech", 0.75), ("audio", 0.25)):
        out = folder / domain
        out.mkdir(parents=True)
        number = round(count * share)
        recordings = -(-number // per_recording)
        with open(out / "wav.scp", "w") as scp:
            for r in range(recordings):
                path = out / f"r{r:06d}.flac"
                shifted = np.roll(wave, int(rng.integers(len(wave))))
                soundfile.write(path, shifted, SAMPLE_RATE)
                scp.write(f"{domain}-r{r:06d} {path}\n")
        with open(out / "segments", "w") as segments, open(out / "utt2spk", "w") as spk:
            for i in range(number):
                r, start = i // per_recording, (i % per_recording) * seconds
                utt = f"{domain}-r{r:06d}-u{i % per_recording:04d}"
                end = start + seconds
                segments.write(f"{utt} {domain}-r{r:06d} {start:.3f} {end:.3f}\n")
                spk.write(f"{utt} {domain}-r{r:06d}\n")


def stages(
    folder: Path, args: argparse.Namespace
) -> Iterator[tuple[str, float, float]]:
    """Run the stages; yields name, seconds, and memory of the largest process (MB)."""
    options = ["--nj", str(args.nj), "--datadir", str(folder / "data")]
    options += ["--dumpdir", str(folder / "dump"), "--expdir", str(folder / "exp")]
    options += ["--speech_dirs", f"speech={folder / 'in/speech'}"]
    options += ["--audio_dirs", f"audio={folder / 'in/audio'}"]
    options += ["--quantizer_iters", "100", "--quantizer_frames", "50000"]
    options += ["--max_piece_seconds", "10", "--min_seconds", "0.2"]
    for number, name in enumerate(STAGES[: args.stop_stage], 1):
        command = ["./run.sh", "--stage", str(number), "--stop_stage", str(number)]
        yield name, *fresh(run_stage, [*command, *options])


def run_stage(command: list[str]) -> tuple[float, float]:
    """Run a command; its seconds, and MB of its largest process."""
    seconds, done = timed(
        lambda: subprocess.run(command, cwd=RECIPE, capture_output=True, text=True),
        torch.device("cpu"),
    )
    if done.returncode:
        raise RuntimeError(f"{command}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main(cmd: list[str] | None = None) -> None:
    """Measure; see ``--help``."""
    args = get_parser().parse_args(cmd)
    print("| utterances | hours | stage | s | utterances/s | x real time | peak MB |")
    print("|--:|--:|---|--:|--:|--:|--:|", flush=True)
    for count in args.utterances:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (args.workdir or Path(temporary)) / str(count)
            shutil.rmtree(folder, ignore_errors=True)
            write_corpus(folder / "in", count, args.seconds, args.seed)
            hours = count * args.seconds / 3600
            for name, seconds, peak in stages(folder, args):
                print(
                    f"| {count} | {hours:.1f} | {name} | {seconds:.0f} | "
                    f"{count / seconds:.0f} | {hours * 3600 / seconds:.0f} | "
                    f"{peak:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Codes of very many utterances in an ark: its scp file held, or looked up."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import MIB, fresh, memory
from tqdm import tqdm

from espnet2_spear.fileio.ark import CodesWriter, MatricesByName, read_matrix, read_scp
from espnet2_spear.fileio.explain import add_options, option_parser
from espnet2_spear.fileio.tables import markdown_table


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = option_parser(__doc__)
    add_options(parser, utterances=1_000_000, num_codebooks=8, seed=0)
    parser.add_argument("--frames", type=int, default=100, help="mean of an utterance")
    parser.add_argument("--reads", type=int, default=20_000, help="at random")
    parser.add_argument("--dir", help="where to write; by default a temporary folder")
    return parser


def write(folder: Path, args: argparse.Namespace) -> float:
    """Write codes; returns the seconds that it took."""
    rng = np.random.default_rng(args.seed)
    seconds = 0.0
    with CodesWriter(folder / "codes.ark", folder / "codes.scp") as ark:
        for i in tqdm(range(args.utterances), unit=" utterances", disable=None):
            shape = (rng.integers(2, 2 * args.frames - 1), args.num_codebooks)
            codes = rng.integers(0, 256, shape, dtype=np.uint8)
            start = time.perf_counter()
            ark.write(f"corpus-{i:09d}", codes)
            seconds += time.perf_counter() - start
    return seconds


def measure(form: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Open the scp file in a fresh process and read some matrices."""
    _, before = memory()
    start = time.perf_counter()
    if form == "dictionary":
        specs = read_scp(folder / "codes.scp")
    else:
        matrices = MatricesByName(folder / "codes.scp")
    opened = time.perf_counter() - start
    rng = np.random.default_rng(args.seed + 1)
    names = [f"corpus-{i:09d}" for i in rng.integers(0, args.utterances, args.reads)]
    total = 0
    start = time.perf_counter()
    for name in names:
        codes = read_matrix(specs[name]) if form == "dictionary" else matrices[name]
        total += int(codes.sum())
    rate = args.reads / (time.perf_counter() - start)
    resident, anonymous = memory()
    return {
        "open": opened,
        "rate": rate,
        "resident": resident,
        "own": anonymous - before,
        "total": total,
    }


def main(cmd=None):
    """Measure; see ``--help``."""
    args = get_parser().parse_args(cmd)
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = Path(name)
        written = write(folder, args)
        size = sum(file.stat().st_size for file in folder.iterdir())
        forms = ("dictionary", "looked up in the file")
        results = {form: fresh(measure, form, folder, args) for form in forms}
    if len({result["total"] for result in results.values()}) > 1:
        raise SystemExit(f"the two forms gave different codes: {results}")
    print(
        f"{args.utterances} utterances of {args.frames} frames on average, "
        f"{args.num_codebooks} codebooks, written in {written:.1f} s, "
        f"{size / MIB:.0f} MB; {args.reads} read at random, seed {args.seed}; "
        "files in the system's cache\n"
    )
    head = ["names", "opened, s", "reads/s"]
    head += ["memory of a worker's own, MB", "resident, MB"]
    rows = [
        [form, f"{r['open']:.3f}", f"{r['rate']:,.0f}"]
        + [f"{r['own']:.1f}", f"{r['resident']:.0f}"]
        for form, r in results.items()
    ]
    print(markdown_table(head, rows))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Codes of very many utterances on disk: Kaldi arks beside the memory-mapped store."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from process_memory import memory
from tqdm import tqdm

from espnet2_spear.codes.store import CodeStore, CodeStoreWriter
from espnet2_spear.fileio.ark import CodesWriter, read_matrix, read_scp

MEGABYTE = 2**20


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--utterances", type=int, default=1_000_000)
    parser.add_argument("--frames", type=int, default=100, help="mean of an utterance")
    parser.add_argument("--num_codebooks", type=int, default=8)
    parser.add_argument("--crop_frames", type=int, default=25)
    parser.add_argument("--crops", type=int, default=20_000, help="read at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", help="where to write; by default a temporary folder")
    return parser


def write_both(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Write the same codes in both forms; returns seconds for each."""
    rng = np.random.default_rng(args.seed)
    seconds = {"ark": 0.0, "store": 0.0}
    with (
        CodesWriter(folder / "fileio.ark", folder / "codes.scp") as ark,
        CodeStoreWriter(folder / "store", args.num_codebooks) as store,
    ):
        for i in tqdm(range(args.utterances), unit=" utterances", disable=None):
            shape = (rng.integers(2, 2 * args.frames - 1), args.num_codebooks)
            codes = rng.integers(0, 256, shape, dtype=np.uint8)
            for name, writer in (("ark", ark), ("store", store)):
                start = time.perf_counter()
                writer.write(f"corpus-{i:09d}", codes)
                seconds[name] += time.perf_counter() - start
    return seconds


def measure(form: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Open one form in a fresh process and read crops from it."""
    _, before = memory()
    start = time.perf_counter()
    if form == "ark":
        source = read_scp(folder / "codes.scp")
    else:
        source = CodeStore(folder / "store")
    opened = time.perf_counter() - start
    rng = np.random.default_rng(args.seed + 1)
    names = [f"corpus-{i:09d}" for i in rng.integers(0, args.utterances, args.crops)]
    total = 0
    start = time.perf_counter()
    for name in names:
        if form == "ark":
            total += int(read_matrix(source[name])[: args.crop_frames].sum())
        else:
            total += int(source.crop(name, 0, args.crop_frames).sum())
    rate = args.crops / (time.perf_counter() - start)
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
        written = write_both(folder, args)
        sizes = {
            "ark": sum(os.path.getsize(folder / f"codes.{x}") for x in ("ark", "scp")),
            "store": sum(f.stat().st_size for f in (folder / "store").iterdir()),
        }
        context = multiprocessing.get_context("spawn")
        results = {}
        for form in written:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                results[form] = pool.submit(measure, form, folder, args).result()
    if len({result["total"] for result in results.values()}) > 1:
        raise SystemExit(f"the two forms gave different codes: {results}")
    print(
        f"{args.utterances} utterances of {args.frames} frames on average, "
        f"{args.num_codebooks} codebooks; {args.crops} crops of {args.crop_frames} "
        f"frames at random, seed {args.seed}; files in the system's cache\n"
    )
    print(
        "| | written, s | size, MB | opened, s | crops/s "
        "| memory of a worker's own, MB | resident, MB |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    for form, result in results.items():
        print(
            f"| {form} | {written[form]:.1f} | {sizes[form] / MEGABYTE:.0f} "
            f"| {result['open']:.3f} | {result['rate']:,.0f} | {result['own']:.1f} "
            f"| {result['resident']:.0f} |"
        )


if __name__ == "__main__":
    main()

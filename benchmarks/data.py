#!/usr/bin/env python3
"""Data of pre-training: ten million utterances, and batches from real files."""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import shutil
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile
from espnet2.samplers.build_batch_sampler import build_batch_sampler
from measure import MIB, fresh, memory
from tqdm import tqdm

from espnet2_spear.codes.targets import TeacherCodes
from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.data.dataset import ManifestDataset, SpearPreprocessor
from espnet2_spear.data.iter_factory import SpearIterFactory, StepBatches
from espnet2_spear.data.manifest import Lists, Manifest, open_manifest
from espnet2_spear.data.noise import SpearCollateFn
from espnet2_spear.data.sampler import SamplerConfig, StepSampler
from espnet2_spear.data.skipping import SkipLimits, SkipLog
from espnet2_spear.fileio.ark import CodesWriter
from espnet2_spear.fileio.datadir import write_table
from espnet2_spear.fileio.explain import option_parser

DOMAINS = ["speech", "audio"]
CORPORA = ("books", "talks", "sounds")  # of equal size; the last is general audio
WEIGHTS = {"books": 1.0, "talks": 1.0, "sounds": 2.0}
TEACHERS = {"speech": TeacherCodes(16, 256, 50.0), "audio": TeacherCodes(8, 256, 25.0)}


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = option_parser(__doc__)
    parser.add_argument("--utterances", type=int, default=10_000_000, help="of lists")
    parser.add_argument("--files", type=int, default=2000, help="really written")
    parser.add_argument("--num_workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=40, help="read, per measurement")
    parser.add_argument("--gpu_seconds", type=float, default=400, help="of a shard")
    parser.add_argument("--shards", type=int, default=8, help="of a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", help="where to write; by default a temporary folder")
    return parser


def lengths(count: int, rng: np.random.Generator) -> np.ndarray:
    """Samples of utterances of 1 to 30 s, most of 3 to 20 s."""
    seconds = np.exp(rng.normal(np.log(9.0), 0.7, count))
    return (np.clip(seconds, 1.0, 30.0) * SAMPLE_RATE).astype(np.int64)


def write_lists(folder: Path, args: argparse.Namespace) -> Lists:
    """Write lists as the recipe's, for files that are not there."""
    samples = lengths(args.utterances, np.random.default_rng(args.seed))
    names = ("utt2num_samples", "utt2domain", "wav.scp", "speech.scp", "audio.scp")
    share = -(-args.utterances // len(CORPORA))
    files = [open(folder / name, "w", encoding="utf-8") for name in names]
    for i in tqdm(range(args.utterances), unit=" utterances", disable=None):
        corpus = CORPORA[i // share]
        utt = f"{corpus}-{i:09d}-0000000-0001000"
        path = f"/data/dump/raw/org/train/flac/{i % 256:02x}/{utt}.flac"
        ark = "/data/dump/codes/train"
        values = (
            samples[i],
            "audio" if corpus == "sounds" else "speech",
            path,
            f"{ark}/speech.{i % 64}.ark:{i * 9000}",
            f"{ark}/audio.{i % 64}.ark:{i * 2250}",
        )
        for file, value in zip(files, values, strict=True):
            file.write(f"{utt} {value}\n")
    for file in files:
        file.close()
    return lists_in(folder)


def lists_in(folder: Path) -> Lists:
    """The lists of a folder, as a training takes them."""
    files = {"speech": "wav.scp", "codes_speech": "speech.scp"}
    files["codes_audio"] = "audio.scp"
    return Lists(
        str(folder / "utt2num_samples"),
        str(folder / "utt2domain"),
        {name: str(folder / file) for name, file in files.items()},
    )


def build(folder: Path, lists: Lists) -> dict:
    """Build the manifest; seconds and peak memory."""
    start = time.perf_counter()
    manifest = open_manifest(folder / "manifest", lists, DOMAINS, CORPORA)
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in manifest.folder.iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "size": size / MIB, "peak": peak}


def start_up(folder: Path, lists: Lists, args: argparse.Namespace) -> dict:
    """What a rank does before its first batch, and in the middle of a training."""
    _, before = memory()
    start = time.perf_counter()
    manifest = open_manifest(folder / "manifest", lists, DOMAINS, CORPORA)
    sampler = make_sampler(manifest, args, args.shards)
    next(sampler.steps())
    result = {"first": time.perf_counter() - start}
    start = time.perf_counter()
    next(sampler.steps(500_000))
    result["resumed"] = time.perf_counter() - start
    start = time.perf_counter()
    steps = list(islice(sampler.steps(), 1000))
    result["step"] = (time.perf_counter() - start) / len(steps)
    result["own"] = memory()[1] - before
    real = sum(int(manifest.samples[rows].sum(dtype=np.int64)) for rows in steps)
    padded = sum(len(rows) * int(manifest.samples[rows].max()) for rows in steps)
    result["waste"] = 1 - real / padded
    result["fill"] = padded / (len(steps) * args.shards * sampler.shard_samples)
    return result


def worker(folder: Path, lists: Lists, seed: int) -> dict:
    """What a worker does with rows, but for the files: look 20 000 of them up."""
    manifest = open_manifest(folder / "manifest", lists, DOMAINS, CORPORA)
    _, before = memory()
    rows = np.random.default_rng(seed).integers(0, len(manifest), 20_000)
    start = time.perf_counter()
    for row in rows:
        manifest.entry(int(row))
    rate = len(rows) / (time.perf_counter() - start)
    resident, own = memory()
    return {"rate": rate, "own": own - before, "anonymous": own, "resident": resident}


def make_sampler(
    manifest: Manifest, args: argparse.Namespace, shards: int
) -> StepSampler:
    """The sampler of the paper's Base on 8 GPUs."""
    return StepSampler(
        manifest,
        SamplerConfig(corpus_weights=WEIGHTS),
        round(args.gpu_seconds * SAMPLE_RATE),
        shards,
        args.seed,
    )


def numel_of_espnet(lists: Lists, args: argparse.Namespace) -> dict:
    """The same lists by ESPnet's batch_type numel, without weights."""
    _, before = memory()
    start = time.perf_counter()
    batches = list(
        build_batch_sampler(
            type="numel",
            shape_files=[lists.lengths],
            batch_size=1,
            batch_bins=round(args.gpu_seconds * SAMPLE_RATE) * args.shards,
            fold_lengths=[],
            sort_in_batch="descending",
            sort_batch="descending",
            drop_last=False,
            min_batch_size=args.shards,
        )
    )
    seconds = time.perf_counter() - start
    own = memory()[1] - before
    return {"seconds": seconds, "own": own, "batches": len(batches)}


def write_files(folder: Path, args: argparse.Namespace) -> Lists:
    """Write audio (16-bit flac) and codes of a small data set."""
    rng = np.random.default_rng(args.seed)
    samples = lengths(args.files, rng)
    ids = [f"{CORPORA[i % len(CORPORA)]}-{i:06d}" for i in range(args.files)]
    order = np.argsort(ids)
    tables: dict[str, dict] = {"utt2num_samples": {}, "utt2domain": {}, "wav.scp": {}}
    with (
        CodesWriter(folder / "speech.ark", folder / "speech.scp") as speech,
        CodesWriter(folder / "audio.ark", folder / "audio.scp") as audio,
    ):
        for i in tqdm(order, unit=" files", disable=None):
            utt, count = ids[i], int(samples[i])
            # Noise that rises and falls, which flac compresses as it does speech.
            level = 0.05 * np.abs(np.sin(np.arange(count) / 5000))
            noise = (level * rng.standard_normal(count)).astype(np.float32)
            soundfile.write(folder / f"{utt}.flac", noise, SAMPLE_RATE)
            speech.write(utt, rng.integers(0, 256, (count // 320, 16)))
            audio.write(utt, rng.integers(0, 256, (count // 640, 8)))
            tables["utt2num_samples"][utt] = count
            tables["utt2domain"][utt] = "audio" if "sounds" in utt else "speech"
            tables["wav.scp"][utt] = folder / f"{utt}.flac"
    for name, table in tables.items():
        write_table(folder / name, table)
    return lists_in(folder)


def read_batches(manifest: Manifest, workers: int, args: argparse.Namespace) -> dict:
    """Read batches of one GPU, as a training does."""
    dataset = ManifestDataset(manifest, SpearPreprocessor(TEACHERS, DOMAINS))
    sampler = make_sampler(manifest, args, shards=1)
    factory = SpearIterFactory(
        dataset,
        StepBatches(sampler, args.batches + 1),
        SpearCollateFn(),
        SkipLog(manifest.folder / "skipped.txt", SkipLimits()),
        bound=sampler.shard_samples,
        num_workers=workers,
    )
    batches = iter(factory.build_iter(1))
    next(batches)  # workers are started
    pids = [process.pid for process in multiprocessing.active_children()]
    own, audio, padded = [], 0, 0
    start = time.perf_counter()
    for number, (_, batch) in enumerate(batches):
        audio += int(batch["speech_lengths"].sum())
        padded += batch["speech"].numel()
        if number in (args.batches // 2, args.batches - 5):  # workers still run
            own.append([memory(pid)[1] for pid in pids])
    seconds = time.perf_counter() - start
    return {
        "batches": args.batches / seconds,
        "realtime": audio / SAMPLE_RATE / seconds,
        "waste": 1 - audio / padded,
        "fill": padded / (args.batches * sampler.shard_samples),
        "own": [max(of_all) for of_all in own if of_all],
    }


def main(cmd=None):
    """Measure; see ``--help``."""
    args = get_parser().parse_args(cmd)
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = Path(name)
        lists = write_lists(folder, args)
        size = sum((folder / f).stat().st_size for f in folder.iterdir()) / MIB
        made = fresh(build, folder, lists)
        ready = fresh(start_up, folder, lists, args)
        reader = fresh(worker, folder, lists, args.seed)
        espnet = fresh(numel_of_espnet, lists, args)
        print(
            f"{args.utterances} utterances in lists of {size:.0f} MB, "
            f"{args.gpu_seconds:g} s a GPU, {args.shards} shards a step, seed "
            f"{args.seed}; lists in the system's cache\n\n"
            f"manifest built: {made['seconds']:.1f} s, {made['size']:.0f} MB, peak "
            f"memory {made['peak']:.0f} MB\n"
            f"start with it: first step after {ready['first']:.2f} s, step 500 000 "
            f"after {ready['resumed']:.2f} s; {ready['step'] * 1e3:.2f} ms a step; "
            f"{ready['own']:.0f} MB of the rank's own\n"
            f"padding {ready['waste']:.1%}, {ready['fill']:.1%} of the bound\n"
            f"worker: {reader['rate']:,.0f} rows/s looked up, {reader['own']:.1f} MB "
            f"more of its own for it ({reader['anonymous']:.0f} MB with Python, NumPy "
            f"and torch; {reader['resident']:.0f} MB with what files back)\n"
            f"ESPnet's batch_type numel on the lengths alone: {espnet['seconds']:.0f} "
            f"s and {espnet['own']:.0f} MB of every rank's own\n"
        )
        for file in folder.iterdir():
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        lists = write_files(folder, args)
        manifest = open_manifest(folder / "manifest", lists, DOMAINS, CORPORA)
        print(
            f"{args.files} files of flac and two arks of codes, "
            f"{args.gpu_seconds:g} s a batch, {args.batches} batches\n\n"
            "| workers | batches/s | times real time | padding | of the bound "
            "| a worker's own after half the batches, and at the end, MB |\n"
            "|--:|--:|--:|--:|--:|--:|"
        )
        for workers in args.num_workers:
            r = read_batches(manifest, workers, args)
            print(
                f"| {workers} | {r['batches']:.2f} | {r['realtime']:,.0f} "
                f"| {r['waste']:.1%} | {r['fill']:.1%} "
                f"| {', '.join(f'{own:.0f}' for own in r['own'])} |"
            )


if __name__ == "__main__":
    main()

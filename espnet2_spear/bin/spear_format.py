#!/usr/bin/env python3
"""Convert a data directory to 16-bit mono files of one rate, one an utterance.

Any format, rate and number of channels goes in; segments are cut. What cannot be used
is tried once more, then listed in skipped.txt with the reason, and the others go on.
Work is done in shards: a killed run continues with the shards that are missing, and a
shard is done again if its audio files or the options have changed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import soundfile

from espnet2_spear.fileio.audio import (
    AudioError,
    AudioInfo,
    Span,
    read_pieces,
    resample,
    to_int16,
)
from espnet2_spear.fileio.datadir import DataDir, DataDirError, Segment, write_table

SHARD_UTTERANCES = 100


@dataclass(frozen=True)
class Recording:
    """A recording and the pieces that are wanted of it."""

    path: str
    pieces: tuple[tuple[str, Span], ...]  # utterance and where it is


@dataclass(frozen=True)
class Result:
    """What became of an utterance; ``reason`` is set where it was skipped.

    ``peak_db`` is the largest deviation from the mean in dB of full scale.
    """

    utt: str
    file: str = ""
    samples: int = 0
    peak_db: float = 0.0
    source_rate: int = 0
    source_channels: int = 0
    clipped: int = 0
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Options:
    """How to write: folder, ``flac`` or ``wav``, sampling rate in Hz."""

    out_dir: str
    audio_format: str
    fs: int


def recordings_of(data: DataDir) -> list[Recording]:
    """Group a data set's utterances by recording."""
    pieces: dict[str, list[tuple[str, Span]]] = {}
    for utt in data.utterances:
        segment = (data.segments or {}).get(utt, Segment(utt, 0.0, -1.0))
        end = None if segment.end < 0 else segment.end
        span = Span(segment.start, end, segment.channel)
        pieces.setdefault(segment.recording, []).append((utt, span))
    return [Recording(data.wav_scp[key], tuple(pieces[key])) for key in sorted(pieces)]


def shards_of(recordings: Iterable[Recording]) -> Iterator[list[Recording]]:
    """Deal recordings into shards of about SHARD_UTTERANCES utterances."""
    shard: list[Recording] = []
    for recording in recordings:
        shard.append(recording)
        if sum(len(r.pieces) for r in shard) >= SHARD_UTTERANCES:
            yield shard
            shard = []
    if shard:
        yield shard


def shard_mark(shard: list[Recording], options: Options) -> Path:
    """Return the file of a shard's results, named by a hash of all it depends on."""
    stamps = []
    for recording in shard:
        try:
            stat = os.stat(recording.path)
            stamps.append((stat.st_size, stat.st_mtime_ns))
        except OSError:
            stamps.append((-1, -1))
    content = json.dumps([[asdict(r) for r in shard], stamps, asdict(options)])
    digest = hashlib.sha256(content.encode()).hexdigest()[:32]
    return Path(options.out_dir) / ".shards" / f"{digest}.jsonl"


def format_shard(shard: list[Recording], options: Options, mark: Path) -> list[Result]:
    """Convert the recordings of a shard, write their results to ``mark``.

    What fails is tried once more at the end: a file server may have been busy for a
    moment.
    """
    results = {r.utt: r for rec in shard for r in format_recording(rec, options)}
    for recording in failed_part(shard, results):
        results |= {r.utt: r for r in format_recording(recording, options)}
    lines = "".join(json.dumps(asdict(result)) + "\n" for result in results.values())
    write_atomically(mark, lines.encode())
    return list(results.values())


def failed_part(
    shard: Iterable[Recording], results: Mapping[str, Result]
) -> Iterator[Recording]:
    """Yield the recordings of a shard with those of their pieces that failed."""
    for recording in shard:
        failed = [piece for piece in recording.pieces if results[piece[0]].reason]
        if failed:
            yield replace(recording, pieces=tuple(failed))


def finished_shard(mark: Path) -> list[Result] | None:
    """Return the results of a shard that is done and whose audio files exist."""
    if not mark.exists():
        return None
    results = [Result(**json.loads(line)) for line in mark.read_text().splitlines()]
    if any(not r.reason and not os.path.exists(r.file) for r in results):
        return None
    return results


def format_recording(recording: Recording, options: Options) -> Iterator[Result]:
    """Convert the pieces of one recording; yield a result for each."""
    done = 0
    try:
        for samples, info in _read(recording):
            utt = recording.pieces[done][0]
            done += 1
            if isinstance(samples, AudioError):
                yield Result(utt, reason=samples.reason, detail=str(samples))
                continue
            samples = resample(samples, info.rate, options.fs)
            if not len(samples):
                yield Result(
                    utt, reason="empty", detail=f"{recording.path}: no samples"
                )
                continue
            pcm, clipped = to_int16(samples)
            file = audio_path(utt, options)
            buffer = io.BytesIO()
            soundfile.write(
                buffer, pcm, options.fs, "PCM_16", format=options.audio_format
            )
            write_atomically(Path(file), buffer.getvalue())
            yield Result(
                utt,
                file,
                len(pcm),
                peak_db(pcm),
                info.rate,
                info.channels,
                clipped,
            )
    except AudioError as error:
        for utt, _ in recording.pieces[done:]:
            yield Result(utt, reason=error.reason, detail=str(error))


def _read(
    recording: Recording,
) -> Iterator[tuple[np.ndarray | AudioError, AudioInfo]]:
    """Read the pieces of a recording; errors of the file system are AudioErrors.

    So they are told from those of writing, such as no space left.
    """
    try:
        yield from read_pieces(recording.path, [span for _, span in recording.pieces])
    except OSError as error:
        remedy = "see that its disk is there and can be read"
        raise AudioError(
            recording.path, "unreadable", error.strerror or str(error), remedy
        ) from error


def audio_path(utt: str, options: Options) -> str:
    """Return an utterance's file; 256 folders keep each of them small."""
    key = hashlib.sha256(utt.encode("utf-8", "surrogateescape")).hexdigest()[:2]
    folder = os.path.join(options.out_dir, options.audio_format, key)
    return os.path.join(folder, f"{utt}.{options.audio_format}")


def peak_db(pcm: np.ndarray) -> float:
    """Return the largest deviation from the mean in dB of full scale, at least -120."""
    peak = np.abs(pcm - pcm.mean()).max() / 32768
    return float(20 * np.log10(max(peak, 1e-6)))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with open(handle, "wb") as out:
            out.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def run(data: DataDir, options: Options, nj: int) -> list[Result]:
    """Convert all utterances with ``nj`` processes; return their results.

    Raises:
        OSError: e.g. no space left; what is finished is kept.
        RuntimeError: a process was killed.
    """
    results: list[Result] = []
    todo = []
    for shard in shards_of(recordings_of(data)):
        mark = shard_mark(shard, options)
        finished = finished_shard(mark)
        if finished is None:
            todo.append((shard, options, mark))
        else:
            results += finished
    if results:
        logging.info("%d utterances are already done", len(results))
    started, total = time.monotonic(), len(todo)
    with ProcessPoolExecutor(max(1, min(nj, total))) as pool:
        jobs = [pool.submit(format_shard, *job) for job in todo]
        try:
            for number, job in enumerate(as_completed(jobs), 1):
                results += job.result()
                if number % max(1, total // 10) == 0:
                    elapsed = time.monotonic() - started
                    logging.info(
                        "%d of %d shards, %.0f s to go",
                        number,
                        total,
                        elapsed / number * (total - number),
                    )
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"{data.path}: a process was killed while converting audio, probably "
                "for lack of memory; run again with a smaller --nj (finished parts are "
                "kept)"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def write_results(data: DataDir, results: list[Result], out_dir: Path) -> None:
    """Write the converted data directory, utt2peak_db and skipped.txt.

    Raises:
        DataDirError: not one utterance could be converted.
    """
    skipped = {r.utt: f"{r.reason} {r.detail}" for r in results if r.reason}
    out_dir.mkdir(parents=True, exist_ok=True)
    write_table(out_dir / "skipped.txt", skipped)
    good = {r.utt: r for r in results if not r.reason}
    if not good:
        raise DataDirError(
            f"{data.path}: none of its {len(results)} utterances could be converted; "
            f"the reasons are in {out_dir}/skipped.txt"
        )
    write_table(
        out_dir / "utt2peak_db", {utt: f"{r.peak_db:.2f}" for utt, r in good.items()}
    )
    DataDir(
        wav_scp={utt: r.file for utt, r in good.items()},
        utt2spk={utt: data.utt2spk[utt] for utt in good},
        utt2domain={utt: d for utt, d in data.utt2domain.items() if utt in good},
        text={utt: text for utt, text in data.text.items() if utt in good},
        utt2num_samples={utt: r.samples for utt, r in good.items()},
    ).write(out_dir)


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in_dir", type=Path, required=True, help="data directory")
    parser.add_argument("--out_dir", type=Path, required=True, help="data directory")
    parser.add_argument("--audio_format", choices=["flac", "wav"], default="flac")
    parser.add_argument("--fs", type=int, default=16000, help="sampling rate in Hz")
    parser.add_argument("--nj", type=int, default=1, help="processes")
    return parser


def main(cmd: list[str] | None = None) -> None:
    """Convert a data directory.

    Example:
        % python -m espnet2_spear.bin.spear_format \\
            --in_dir data/train --out_dir dump/raw/org/train --nj 4
    """
    args = get_parser().parse_args(cmd)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s (%(module)s:%(lineno)d) %(levelname)s: %(message)s",
    )
    data = DataDir.load(args.in_dir)
    data.validate()
    options = Options(str(args.out_dir), args.audio_format, args.fs)
    results = run(data, options, args.nj)
    write_results(data, results, args.out_dir)
    good = [r for r in results if not r.reason]
    logging.info(
        "%s: %d utterances, %.1f min; %d resampled to %d Hz, %d mixed down to mono, "
        "%d clipped",
        args.out_dir,
        len(good),
        sum(r.samples for r in good) / args.fs / 60,
        sum(r.source_rate != args.fs for r in good),
        args.fs,
        sum(r.source_channels > 1 for r in good),
        sum(r.clipped > 0 for r in good),
    )
    reasons = Counter(r.reason for r in results if r.reason)
    if reasons:
        logging.warning(
            "skipped %d utterances (%s), listed in %s/skipped.txt",
            sum(reasons.values()),
            ", ".join(f"{reason} {n}" for reason, n in sorted(reasons.items())),
            args.out_dir,
        )


if __name__ == "__main__":
    main()

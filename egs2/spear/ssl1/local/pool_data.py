#!/usr/bin/env python3
"""Pool data directories into the sets train and valid for pre-training.

Long recordings are cut into pieces (Kaldi segments). Which recordings are held out,
and which are kept under a limit, is decided by a hash of their ids: the choice is the
same on every machine and does not change when data is added.
"""

import argparse
import hashlib
import logging
import math
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from espnet2_spear.fileio.audio import AudioError, audio_info
from espnet2_spear.fileio.datadir import (
    DOMAINS,
    DataDir,
    DataDirError,
    Segment,
    combine,
)


def hash_fraction(key: str, salt: str) -> float:
    """Return a number in [0, 1) that depends on nothing but the two strings."""
    digest = hashlib.sha256(f"{salt} {key}".encode("utf-8", "surrogateescape"))
    return int.from_bytes(digest.digest()[:8], "big") / 2**64


def recording_seconds(path: str) -> float:
    """Return a recording's duration, or -1 if it cannot be read (stage 2 lists it)."""
    try:
        return audio_info(path).seconds
    except AudioError:
        return -1.0


def cut(data: DataDir, seconds: dict[str, float], max_seconds: float) -> DataDir:
    """Return the set with utterances over ``max_seconds`` in pieces of equal length.

    Pieces are named as in Kaldi, by utterance, start and end in 1/100 s, and have no
    transcript. Unreadable recordings stay whole, with Kaldi's -1 for the end.
    """
    result = DataDir(wav_scp=data.wav_scp, utt2spk={}, segments={}, path=data.path)
    for utt in data.utterances:
        segment = (data.segments or {}).get(utt, Segment(utt, 0.0, -1.0))
        start, end = segment.start, segment.end
        if end < 0:
            end = seconds[segment.recording]
        count = max(1, math.ceil((end - start) / max_seconds - 1e-6))
        step = (end - start) / count
        for index in range(count):
            first = start + index * step
            last = end if index == count - 1 else first + step
            piece = utt
            if count > 1:
                piece = f"{utt}-{round(first * 100):07d}-{round(last * 100):07d}"
            elif utt in data.text:
                result.text[piece] = data.text[utt]
            result.segments[piece] = segment._replace(start=first, end=last)
            speaker = data.utt2spk[utt]
            result.utt2spk[piece] = piece if speaker == utt else speaker
            result.utt2domain[piece] = data.utt2domain[utt]
    return result


def recording_of(data: DataDir, utt: str) -> str:
    """Return the recording that an utterance is taken from."""
    return data.segments[utt].recording if data.segments is not None else utt


def hold_out(data: DataDir, fraction: float) -> set[str]:
    """Return the utterances of about ``fraction`` of the recordings of each domain.

    Recordings are held out whole, at least one of each domain that has two.
    """
    by_domain: dict[str, set[str]] = {domain: set() for domain in DOMAINS}
    for utt, domain in data.utt2domain.items():
        by_domain[domain].add(recording_of(data, utt))
    held: set[str] = set()
    for recordings in by_domain.values():
        order = sorted(recordings, key=lambda key: hash_fraction(key, "valid"))
        chosen = [key for key in order if hash_fraction(key, "valid") < fraction]
        if not chosen and len(order) > 1:
            chosen = order[:1]
        held.update(chosen)
    return {utt for utt in data.utterances if recording_of(data, utt) in held}


def limit_hours(data: DataDir, utts: Iterable[str], domain: str, hours: float) -> set:
    """Drop utterances of a domain, in the order of their hash, beyond ``hours``."""
    keep, total = set(), 0.0
    for utt in sorted(utts, key=lambda key: hash_fraction(key, "limit")):
        if data.utt2domain[utt] == domain:
            segment = data.segments[utt]
            seconds = segment.end - segment.start
            if total + seconds > hours * 3600:
                continue
            total += seconds
        keep.add(utt)
    return keep


def limit_count(data: DataDir, utts: Iterable[str], count: int) -> set:
    """Keep ``count`` utterances, the domains in turn, in the order of their hash."""
    order = sorted(utts, key=lambda key: hash_fraction(key, "limit"))
    queues = [
        [utt for utt in order if data.utt2domain[utt] == domain] for domain in DOMAINS
    ]
    ranked = sorted(
        (rank, index, utt)
        for index, queue in enumerate(queues)
        for rank, utt in enumerate(queue)
    )
    return {utt for _, _, utt in ranked[:count]}


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out_dir", type=Path, required=True, help="gets train, valid")
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], help="id lists")
    parser.add_argument("--valid_fraction", type=float, default=0.025)
    parser.add_argument("--max_piece_seconds", type=float, default=10.0)
    parser.add_argument("--max_hours_speech", type=float, default=math.inf)
    parser.add_argument("--max_hours_audio", type=float, default=math.inf)
    parser.add_argument("--max_utts", type=int, default=0, help="per set; 0: all")
    parser.add_argument("--nj", type=int, default=1, help="processes")
    parser.add_argument("sources", type=Path, nargs="+", help="data directories")
    return parser


def main(cmd: list[str] | None = None) -> None:
    """Write the data directories train and valid."""
    args = get_parser().parse_args(cmd)
    excluded = {
        line.split()[0]
        for path in args.exclude
        for line in path.read_text().splitlines()
        if line.strip()
    }
    pieces = []
    with ProcessPoolExecutor(args.nj) as pool:
        for source in args.sources:
            data = DataDir.load(source)
            data.validate(require=("utt2domain",))
            data = data.select(set(data.utterances) - excluded)
            found = pool.map(recording_seconds, data.wav_scp.values(), chunksize=50)
            seconds = dict(zip(data.wav_scp, found, strict=True))
            pieces.append(cut(data, seconds, args.max_piece_seconds))
    data = combine(pieces)
    valid = hold_out(data, args.valid_fraction)
    if not valid:
        raise DataDirError(
            f"{', '.join(map(str, args.sources))}: one recording of each domain is too "
            "few to hold some out for validation; add recordings, or cut them to files"
        )
    train = set(data.utterances) - valid
    for domain in DOMAINS:
        hours = getattr(args, f"max_hours_{domain}")
        if hours < math.inf:
            train = limit_hours(data, train, domain, hours)
    for name, utts in (("train", train), ("valid", valid)):
        if args.max_utts > 0:
            utts = limit_count(data, utts, args.max_utts)
        part = data.select(utts)
        part.path = args.out_dir / name
        part.validate(require=("utt2domain",))
        part.write(part.path)
        for domain in DOMAINS:
            of_domain = [u for u in part.utterances if part.utt2domain[u] == domain]
            total = sum(
                part.segments[utt].end - part.segments[utt].start for utt in of_domain
            )
            logging.info(
                "%s: %d utterances of %s, %.1f min",
                name,
                len(of_domain),
                domain,
                total / 60,
            )


if __name__ == "__main__":
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s (%(module)s:%(lineno)d) %(levelname)s: %(message)s",
    )
    main()

"""What a process does of a tokenization: a shard at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from multiprocessing import current_process, parent_process

import torch

from espnet2_spear.codes.tokenizer import TokenizeOptions, Tokenizer
from espnet2_spear.fileio.ark import CodesWriter
from espnet2_spear.fileio.shards import Batches
from espnet2_spear.fileio.utterances import Utterance
from espnet2_spear.teachers.extract import read_batch


def tokenize_shard(
    tokenizers: Sequence[Tokenizer],
    batches: Batches,
    wanted: Sequence[Collection[str]],
    stems: Sequence[str],
) -> list[dict]:
    """Write one shard of every teacher; returns the records of its done marks.

    What fails is tried once more at the end.

    Args:
        tokenizers: one a teacher.
        batches: audio, read once for all of them.
        wanted: names of the utterances that each teacher tokenizes.
        stems: of each teacher's files.
    """
    frames = [0] * len(tokenizers)
    failed: list[list[tuple[str, str]]] = [[] for _ in tokenizers]

    def tokenize(batch: Sequence[Utterance], names: Sequence[Collection[str]]) -> None:
        audio = read_batch(batch)
        for i, tokenizer in enumerate(tokenizers):
            for utt, codes in tokenizer.encode(audio.select(names[i]), failed[i]):
                writers[i].write(utt, codes)
                frames[i] += len(codes)

    with ExitStack() as stack:
        writers = [
            stack.enter_context(CodesWriter(f"{stem}.ark", f"{stem}.scp"))
            for stem in stems
        ]
        for batch in batches:
            tokenize(batch, wanted)
        # Once more, each alone: a file server may have been busy for a moment.
        again = [{utt for utt, _ in failures} for failures in failed]
        for failures in failed:
            failures.clear()
        for utterance in (u for batch in batches for u in batch):
            if any(utterance.utt in names for names in again):
                tokenize([utterance], again)
    return [
        {
            "frames": frames[i],
            "failed": failed[i],
            "crc32": writer.crc32,
        }
        for i, writer in enumerate(writers)
    ]


# Of a worker process; building teachers for every shard would cost seconds.
_tokenizers: list[Tokenizer] = []


def start_worker(
    teachers: Sequence[TokenizeOptions], devices: Sequence[str], threads: int
) -> None:
    """Build the tokenizers of a worker process; the devices are dealt out."""
    # A worker whose run was killed would wait for ever, or write beside the next run.
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(threads)
    # Spawned workers are numbered from 1.
    number = int(current_process().name.rpartition("-")[2] or 0)
    device = devices[number % len(devices)]
    _tokenizers.extend(Tokenizer(options, device) for options in teachers)


def _follow_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def work(
    batches: Batches, wanted: Sequence[Collection[str]], stems: Sequence[str]
) -> list[dict]:
    """As :func:`tokenize_shard`, with the tokenizers of this worker process."""
    return tokenize_shard(_tokenizers, batches, wanted, stems)

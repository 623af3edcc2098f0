"""One process of a tokenization: its teachers and quantizers, a shard at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from multiprocessing import current_process, parent_process
from typing import Any, NamedTuple

import torch

from espnet2_spear.codes.tokenizer import TokenizeOptions, Tokenizer
from espnet2_spear.fileio.ark import CodesWriter
from espnet2_spear.fileio.shards import Batches
from espnet2_spear.fileio.utterances import Utterance
from espnet2_spear.teachers.embed import read_batch


class Shard(NamedTuple):
    """A shard, as it is sent to a worker.

    Attributes:
        number: of the shard.
        batches: audio, read once for all teachers.
        wanted: for each teacher, the names of the utterances that it tokenizes.
        stems: for each teacher, the path of its files without ``.ark`` and ``.scp``.
    """

    number: int
    batches: Batches
    wanted: Sequence[Collection[str]]
    stems: Sequence[str]


def tokenize_shard(
    tokenizers: Sequence[Tokenizer], shard: Shard
) -> tuple[int, list[dict[str, Any]]]:
    """Write the codes of one shard; what fails is tried once more at the end.

    Returns:
        the number of the shard, and for each teacher how many ``frames`` were written
        and which utterances ``failed``, with the reason.
    """
    records: list[dict[str, Any]] = [{"frames": 0, "failed": []} for _ in tokenizers]

    def tokenize(batch: Sequence[Utterance], names: Sequence[Collection[str]]) -> None:
        audio = read_batch(batch)
        for i, tokenizer in enumerate(tokenizers):
            encoded, failed = tokenizer.encode(audio.select(names[i]))
            records[i]["failed"] += failed
            for utt, codes in encoded.items():
                writers[i].write(utt, codes)
                records[i]["frames"] += len(codes)

    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                CodesWriter(
                    f"{stem}.ark", f"{stem}.scp", tokenizer.quantizer.codebook_size
                )
            )
            for stem, tokenizer in zip(shard.stems, tokenizers, strict=True)
        ]
        for batch in shard.batches:
            tokenize(batch, shard.wanted)
        # Once more, each alone: a file server may have been busy for a moment.
        again = [{utt for utt, _ in record["failed"]} for record in records]
        for record in records:
            record["failed"] = []
        for utterance in (u for batch in shard.batches for u in batch):
            if any(utterance.utt in names for names in again):
                tokenize([utterance], again)
    return shard.number, records


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


def work(shard: Shard) -> tuple[int, list[dict[str, Any]]]:
    """As :func:`tokenize_shard`, with the tokenizers of this worker process."""
    return tokenize_shard(_tokenizers, shard)

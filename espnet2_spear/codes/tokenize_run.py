"""Tokenization of a data set: dealt out in shards to processes, resumed, merged."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from multiprocessing import current_process, get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from espnet2_spear.codes.tokenizer import TokenizeOptions, Tokenizer, check_agreement
from espnet2_spear.fileio.ark import SCP_COLUMNS, CodesWriter, write_missing_codes
from espnet2_spear.fileio.atomic import write_atomically, write_json
from espnet2_spear.fileio.external_sorter import ExternalSorter
from espnet2_spear.fileio.hashes import digest_of, hash_of
from espnet2_spear.fileio.shards import (
    WHOLE_JOB,
    Batches,
    DoneMarks,
    JobShare,
    Shards,
    fingerprint,
    in_processes,
    shard_stem,
    split_into_shards,
)
from espnet2_spear.fileio.tables import join, rows, table_writer
from espnet2_spear.fileio.utterances import Utterance, UtteranceTable, make_batches
from espnet2_spear.teachers.base import TeacherError
from espnet2_spear.teachers.embed import read_batch


class TokenizeRun:
    """Tokenization of the utterances of one data set by one teacher or several.

    Writes for every shard and teacher ``<name>/codes.<shard>.{ark,scp}`` (a thousand a
    folder, see :func:`shard_stem`) and, when all are there, for every teacher
    ``<name>.scp`` with a line for every utterance in the order of names,
    ``<name>.failed`` and ``<name>.json``. Utterances without codes (not to be
    tokenized, or failed) point to the row of -1 in ``<name>.missing.ark``.
    Several teachers share one reading of the audio, their shards and their done marks.

    Args:
        teachers: how the codes of each are made.
        output_dir: made if it is not there; lines of the scp files begin with it.
        batch_seconds: bound of a batch's audio, padding included.
        shard_seconds: audio in a shard; by default 600, or more for very much audio.
        min_agreement: share of float32's codes that lower precision has to give.
    """

    def __init__(
        self,
        teachers: Sequence[TokenizeOptions],
        output_dir: str | Path,
        batch_seconds: float = 20.0,
        shard_seconds: float | None = None,
        min_agreement: float = 0.5,
    ) -> None:
        self.teachers, self.folder = list(teachers), Path(output_dir)
        self.batch_seconds, self.shard_seconds = batch_seconds, shard_seconds
        self.min_agreement = min_agreement

    def run(
        self,
        everyone: UtteranceTable,
        chosen: Sequence[UtteranceTable],
        nj: int = 1,
        num_threads: int = 1,
        devices: Sequence[str] = ("cpu",),
        part: JobShare | None = None,
    ) -> list[dict[str, Any]]:
        """Tokenize.

        Args:
            everyone: all utterances; those that the scp files list.
            chosen: for each teacher those of them to tokenize.
            nj: number of processes; 1 works in this one.
            num_threads: of each process.
            devices: processes are dealt out to them.
            part: make only the shards of this part, and no table of all.

        Returns:
            for each teacher what ``<name>.json`` holds: teacher, quantizer, counts;
            nothing for a part.

        Raises:
            TeacherError: a teacher and its quantizer do not match, lower precision
                gives too few of float32's codes, or not one of a teacher's utterances
                could be tokenized.
            QuantizerError: no quantizer, or options that it does not have.
        """
        # Built here in any case, so that errors come before work is dealt out.
        tokenizers = [Tokenizer(options) for options in self.teachers]
        marks = self._marks(tokenizers, chosen)
        share = part or WHOLE_JOB
        if marks.clear_stale(share) or part is None:
            for options in self.teachers:
                (self.folder / f"{options.name}.scp").unlink(missing_ok=True)
        of_any = np.concatenate([table.places for table in chosen])
        union = everyone.take(np.flatnonzero(np.isin(everyone.places, of_any)))
        shards = split_into_shards(
            make_batches(union, self.batch_seconds), self.shard_seconds
        )
        agreements = [
            check_agreement(tokenizer, utterances, devices[0], self.min_agreement)
            for tokenizer, utterances in zip(tokenizers, chosen, strict=True)
        ]
        wanted = [np.isin(union.places, table.places) for table in chosen]

        def compute(todo: list[int]) -> Iterator[tuple[int, Any, list[str]]]:
            jobs = (self._job(shards, i, wanted) for i in todo)
            processes = min(nj, len(todo))
            if processes > 1:
                pool = ProcessPoolExecutor(
                    processes,
                    mp_context=get_context("spawn"),
                    initializer=start_worker,
                    initargs=(self.teachers, devices, num_threads),
                )
                done = in_processes(pool, work, jobs, processes, self.folder)
            else:
                torch.set_num_threads(num_threads)
                for tokenizer in tokenizers:
                    tokenizer.to(devices[0])
                done = (tokenize_shard(tokenizers, job) for job in jobs)
            for i, record in done:
                stems = self._stems(i)
                yield i, record, [f"{s}.{x}" for s in stems for x in ("ark", "scp")]

        records = marks.records(shards, compute, share)
        if part is not None:
            return []
        return [
            self._merge(tokenizer, [r[n] for r in records], everyone, agreements[n])
            for n, tokenizer in enumerate(tokenizers)
        ]

    def _marks(
        self, tokenizers: Sequence[Tokenizer], chosen: Sequence[UtteranceTable]
    ) -> DoneMarks:
        """Done marks, one a shard, known by all that the codes depend on."""
        prints = []
        for tokenizer, utterances in zip(tokenizers, chosen, strict=True):
            facts = {
                **asdict(tokenizer.options),
                **tokenizer.teacher.describe(),
                "quantizer": hash_of(tokenizer.options.quantizer),
                "folder": str(self.folder),
                "seconds": [self.batch_seconds, self.shard_seconds],
            }
            del facts["max_frames"]  # the search does not depend on it
            prints.append(fingerprint(facts, utterances))
        name = "+".join(options.name for options in self.teachers)
        return DoneMarks(self.folder, f"{name}/codes", digest_of(prints))

    def _stems(self, shard: int) -> list[str]:
        """Stems of the files of each teacher."""
        return [self._stem(t.name, shard) for t in self.teachers]

    def _stem(self, teacher: str, shard: int) -> str:
        return str(self.folder / shard_stem(f"{teacher}/codes", shard))

    def _job(self, shards: Shards, number: int, wanted: Sequence[np.ndarray]) -> Shard:
        """A shard, as it is sent to a worker.

        Args:
            shards: of all.
            number: of the shard.
            wanted: for each teacher, bool (utterances,).
        """
        batches = shards[number]
        where = shards.places(number)
        utts = [utterance.utt for batch in batches for utterance in batch]
        names = [
            {utt for utt, is_wanted in zip(utts, mask[where], strict=True) if is_wanted}
            for mask in wanted
        ]
        return Shard(number, batches, names, self._stems(number))

    def _merge(
        self,
        tokenizer: Tokenizer,
        records: Sequence[dict[str, Any]],
        everyone: UtteranceTable,
        agreement: float | None,
    ) -> dict[str, Any]:
        """Write a teacher's tables of all shards; returns its summary.

        Args:
            tokenizer: of the teacher.
            records: of its shards, in order.
            everyone: all utterances.
            agreement: as of :func:`check_agreement`.
        """
        name = tokenizer.options.name
        failed = [failure for record in records for failure in record["failed"]]
        lines = "".join(f"{utt} {reason}\n" for utt, reason in failed)
        write_atomically(
            self.folder / f"{name}.failed", lines.encode("utf-8", "surrogateescape")
        )
        for utt, reason in failed:
            logging.warning(f"skipped {utt}: {reason}")
        quantizer = tokenizer.quantizer
        with ExternalSorter[tuple[str, str]](folder=self.folder) as codes:
            for i in range(len(records)):
                for row in rows(Path(f"{self._stem(name, i)}.scp"), SCP_COLUMNS):
                    codes.add(row)
            tokenized = len(codes)
            if failed and not tokenized:
                raise TeacherError(
                    f"{self.folder}/{name}.failed: none of the {len(failed)} "
                    "utterances could be tokenized; see the reasons there"
                )
            missing = write_missing_codes(
                self.folder / f"{name}.missing.ark", quantizer.num_codebooks
            )
            summary = {
                **tokenizer.describe(),
                "frames": sum(record["frames"] for record in records),
                "tokenized": tokenized,
                "failed": len(failed),
                "not_asked_for": len(everyone) - tokenized - len(failed),
            }
            if agreement is not None:
                unknown = math.isnan(agreement)
                summary["float32_agreement"] = None if unknown else agreement
            write_json(self.folder / f"{name}.json", summary)
            names = ((utterance.utt,) for utterance in everyone)
            with table_writer(self.folder / f"{name}.scp") as scp:
                for utt, (_, row) in join(names, codes):
                    scp.add(utt, row[1] if row else missing)
        return summary


# --- A process that works -------------------------------------------------------------


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
    """Call :func:`tokenize_shard` with the tokenizers of this worker process."""
    return tokenize_shard(_tokenizers, shard)

"""Tokenization of a data set: shards, processes, resumption."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict
from multiprocessing import current_process, get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from espnet2_spear.fileio.kaldi_ark import CodesWriter, read_scp, write_missing_codes
from espnet2_spear.teachers.extract import Utterance, make_batches, read_batch
from espnet2_spear.teachers.shards import (
    Batches,
    DoneMarks,
    Progress,
    deal,
    duration,
    fingerprint,
    write_text,
)
from espnet2_spear.teachers.tokenize import TokenizeOptions, Tokenizer
from espnet2_spear.teachers.weights import sha256_of

AGREEMENT_UTTERANCES = 16  # compared with float32 before a run in lower precision


def _tokenize_shard(
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
            "ark_bytes": os.path.getsize(f"{stem}.ark"),
        }
        for i, stem in enumerate(stems)
    ]


# Of a worker process; building teachers for every shard would cost seconds.
_tokenizers: list[Tokenizer] = []


def _start_worker(
    teachers: Sequence[TokenizeOptions], devices: Sequence[str], threads: int
) -> None:
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


def _work(
    batches: Batches, wanted: Sequence[Collection[str]], stems: Sequence[str]
) -> list[dict]:
    return _tokenize_shard(_tokenizers, batches, wanted, stems)


class TokenizeRun:
    """Tokenization of the utterances of one data set by one teacher or several.

    Writes for every teacher ``<name>.<shard>.{ark,scp,done}`` and, when all are
    there, ``<name>.scp`` with a line for every utterance in the order given,
    ``<name>.failed`` and ``<name>.json``. Utterances without codes (not to be
    tokenized, or failed) point to the row of -1 in ``<name>.missing.ark``. Several
    teachers share one reading of the audio, and their shards.

    Args:
        teachers: how the codes of each are made.
        output_dir: made if it is not there; lines of the scp files begin with it.
        batch_seconds: bound of a batch's audio, padding included.
        shard_seconds: audio in a shard.
    """

    def __init__(
        self,
        teachers: Sequence[TokenizeOptions],
        output_dir: str | Path,
        batch_seconds: float = 20.0,
        shard_seconds: float = 600.0,
    ) -> None:
        self.teachers, self.folder = list(teachers), Path(output_dir)
        self.batch_seconds, self.shard_seconds = batch_seconds, shard_seconds

    def _stems(self, shard: int) -> list[str]:
        return [str(self.folder / f"{t.name}.{shard}") for t in self.teachers]

    def _is_done(self, marks: Sequence[DoneMarks], shard: int) -> bool:
        for mark, stem in zip(marks, self._stems(shard), strict=True):
            record, ark = mark.read(shard), Path(f"{stem}.ark")
            if record is None or not os.path.exists(f"{stem}.scp"):
                return False
            if not ark.exists() or ark.stat().st_size != record["ark_bytes"]:
                return False
        return True

    def run(
        self,
        utterances: Sequence[Sequence[Utterance]],
        everyone: Sequence[str],
        nj: int = 1,
        num_threads: int = 1,
        devices: Sequence[str] = ("cpu",),
    ) -> list[dict[str, Any]]:
        """Tokenize.

        Args:
            utterances: for each teacher those to tokenize.
            everyone: names of all utterances, in the order of the scp files.
            nj: number of processes; 1 works in this one.
            num_threads: of each process.
            devices: processes are dealt out to them.

        Returns:
            for each teacher what ``<name>.json`` holds: teacher, quantizer, counts.

        Raises:
            TeacherError: a teacher and its quantizer do not match.
            ValueError: not one of a teacher's utterances could be tokenized.
        """
        # Built here in any case, so that errors come before work is dealt out.
        device = devices[0] if nj == 1 else "cpu"
        tokenizers = [Tokenizer(options, device) for options in self.teachers]
        marks = self._marks(tokenizers, utterances)
        batches = make_batches(_union(utterances), self.batch_seconds)
        shards = deal(batches, self.shard_seconds)
        todo = [i for i in range(len(shards)) if not self._is_done(marks, i)]
        if len(todo) < len(shards):
            logging.info(f"{len(shards) - len(todo)} of {len(shards)} shards are done")
        agreements = [
            _compare(tokenizer, chosen)
            for tokenizer, chosen in zip(tokenizers, utterances, strict=True)
        ]
        progress = Progress(sum(duration(shards[i]) for i in todo), len(todo))
        names = [{u.utt for u in chosen} for chosen in utterances]
        jobs = {i: (shards[i], _share(names, shards[i]), self._stems(i)) for i in todo}
        nj = min(nj, len(todo))
        for i, records in self._results(tokenizers, jobs, nj, num_threads, devices):
            for mark, record in zip(marks, records, strict=True):
                mark.write(i, record)
            progress.add(duration(shards[i]))
        return [
            self._merge(
                tokenizer, [mark.read(i) for i in range(len(shards))], everyone, share
            )
            for tokenizer, mark, share in zip(
                tokenizers, marks, agreements, strict=True
            )
        ]

    def _marks(
        self, tokenizers: Sequence[Tokenizer], utterances: Sequence[Sequence[Utterance]]
    ) -> list[DoneMarks]:
        """Done marks of this run, those of others removed with their shards."""
        digest = hashlib.sha256()
        for tokenizer, chosen in zip(tokenizers, utterances, strict=True):
            options = {
                **asdict(tokenizer.options),
                "quantizer": sha256_of(Path(tokenizer.options.quantizer)),
                "folder": str(self.folder),
                "seconds": [self.batch_seconds, self.shard_seconds],
            }
            digest.update(fingerprint(tokenizer.teacher, chosen, options).encode())
        marks = [
            DoneMarks(self.folder, options.name, digest.hexdigest())
            for options in self.teachers
        ]
        for mark in marks:
            mark.clear_stale()
            (self.folder / f"{mark.name}.scp").unlink(missing_ok=True)
        return marks

    def _results(
        self,
        tokenizers: Sequence[Tokenizer],
        jobs: Mapping[int, tuple],
        nj: int,
        num_threads: int,
        devices: Sequence[str],
    ) -> Iterator[tuple[int, list[dict]]]:
        if nj <= 1:
            if jobs:
                torch.set_num_threads(num_threads)
            for i, job in jobs.items():
                yield i, _tokenize_shard(tokenizers, *job)
            return
        with ProcessPoolExecutor(
            nj,
            mp_context=get_context("spawn"),
            initializer=_start_worker,
            initargs=(self.teachers, devices, num_threads),
        ) as pool:
            futures = {pool.submit(_work, *job): i for i, job in jobs.items()}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BrokenProcessPool as error:
                raise RuntimeError(
                    f"{self.folder}: a process was killed, perhaps for lack of memory; "
                    "run it again with a smaller --nj or --batch_seconds (finished "
                    "shards are kept)"
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _merge(
        self,
        tokenizer: Tokenizer,
        records: Sequence[dict],
        everyone: Sequence[str],
        agreement: float | None,
    ) -> dict[str, Any]:
        name = tokenizer.options.name
        failed = [failure for record in records for failure in record["failed"]]
        codes: dict[str, str] = {}
        for i in range(len(records)):
            codes.update(read_scp(self.folder / f"{name}.{i}.scp"))
        quantizer, teacher = tokenizer.quantizer, tokenizer.teacher
        write_text(
            self.folder / f"{name}.failed",
            "".join(f"{utt} {reason}\n" for utt, reason in failed),
        )
        for utt, reason in failed:
            logging.warning(f"skipped {utt}: {reason}")
        if failed and not codes:
            raise ValueError(
                f"{self.folder}/{name}.failed: none of the {len(failed)} "
                "utterances could be tokenized; see the reasons there"
            )
        missing = write_missing_codes(
            self.folder / f"{name}.missing.ark", quantizer.num_codebooks
        )
        summary = {
            "teacher": teacher.describe(),
            "quantizer": tokenizer.options.quantizer,
            "quantizer_id": quantizer.identity,
            "quantizer_kind": quantizer.kind,
            "frame_rate": teacher.frame_rate,
            "num_codebooks": quantizer.num_codebooks,
            "codebook_size": quantizer.codebook_size,
            "frames": sum(record["frames"] for record in records),
            "tokenized": len(codes),
            "failed": len(failed),
            "not_asked_for": len(everyone) - len(codes) - len(failed),
            "dtype": tokenizer.options.dtype,
        }
        if agreement is not None:
            summary["float32_agreement"] = agreement
        write_text(self.folder / f"{name}.json", json.dumps(summary, indent=1) + "\n")
        lines = (f"{utt} {codes.get(utt, missing)}\n" for utt in everyone)
        write_text(self.folder / f"{name}.scp", "".join(lines))
        return summary


def _union(parts: Sequence[Sequence[Utterance]]) -> list[Utterance]:
    """Utterances that are in any of the parts, each once."""
    return list({u.utt: u for part in parts for u in part}.values())


def _share(names: Sequence[Collection[str]], batches: Batches) -> list[Collection[str]]:
    """Of each teacher's utterances those in a shard: all that a worker is sent."""
    here = {u.utt for batch in batches for u in batch}
    return [chosen & here for chosen in names]


def _compare(tokenizer: Tokenizer, utterances: Sequence[Utterance]) -> float | None:
    """Compare the codes of some utterances with those of float32, and say it."""
    if tokenizer.options.dtype == "float32":
        return None
    step = max(1, len(utterances) // AGREEMENT_UTTERANCES)
    share = tokenizer.agreement(utterances[::step][:AGREEMENT_UTTERANCES])
    logging.info(
        f"{tokenizer.options.name}: {100 * share:.1f} % of the codes of "
        f"{min(len(utterances), AGREEMENT_UTTERANCES)} utterances in "
        f"{tokenizer.options.dtype} are those of float32"
    )
    return share

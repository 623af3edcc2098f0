"""Tokenization of a data set: shards, processes, resumption."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    as_completed,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from espnet2_spear.codes.tokenize_worker import start_worker, tokenize_shard, work
from espnet2_spear.codes.tokenizer import TokenizeOptions, Tokenizer
from espnet2_spear.fileio.ark import scp_lines, write_missing_codes
from espnet2_spear.fileio.hashes import crc32_of, sha256_of
from espnet2_spear.fileio.part import WHOLE, Part
from espnet2_spear.fileio.shards import (
    Batches,
    DoneMarks,
    Progress,
    Shards,
    deal,
    fingerprint,
    write_text,
)
from espnet2_spear.fileio.spool import Spool
from espnet2_spear.fileio.tables import TableWriter
from espnet2_spear.fileio.utterances import (
    Utterance,
    UtteranceTable,
    make_batches,
)
from espnet2_spear.teachers.base import TeacherError

AGREEMENT_UTTERANCES = 16  # compared with float32 before a run in lower precision
LOW_AGREEMENT = 0.8  # share of float32's codes below which there is a warning


class TokenizeRun:
    """Tokenization of the utterances of one data set by one teacher or several.

    Writes for every teacher ``<name>/codes.<shard>.{ark,scp,done}`` and, when all are
    there, ``<name>.scp`` with a line for every utterance in the order of names,
    ``<name>.failed`` and ``<name>.json``. Utterances without codes (not to be
    tokenized, or failed) point to the row of -1 in ``<name>.missing.ark``. Several
    teachers share one reading of the audio, and their shards.

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

    def _stems(self, shard: int) -> list[str]:
        return [str(self.folder / t.name / f"codes.{shard}") for t in self.teachers]

    def _is_done(self, marks: Sequence[DoneMarks], shard: int) -> bool:
        """Whether a shard's files are there and hold what was written to them."""
        for mark, stem in zip(marks, self._stems(shard), strict=True):
            record = mark.read(shard)
            if record is None:
                return False
            if [crc32_of(f"{stem}.{kind}") for kind in ("ark", "scp")] != record.get(
                "crc32"
            ):
                return False
        return True

    def run(
        self,
        everyone: UtteranceTable,
        chosen: Sequence[UtteranceTable],
        nj: int = 1,
        num_threads: int = 1,
        devices: Sequence[str] = ("cpu",),
        part: Part | None = None,
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
        marks = self._marks(tokenizers, chosen, part or WHOLE)
        union = chosen[0].union(chosen[1:])
        shards = deal(make_batches(union, self.batch_seconds), self.shard_seconds)
        own = [i for i in range(len(shards)) if part is None or part.has(i)]
        todo = [i for i in own if not self._is_done(marks, i)]
        if len(todo) < len(own):
            logging.info(f"{len(own) - len(todo)} of {len(own)} shards are done")
        nj = min(nj, len(todo))
        agreements = [
            self._compare(tokenizer, part, devices[0])
            for tokenizer, part in zip(tokenizers, chosen, strict=True)
        ]
        if nj == 1:
            for tokenizer in tokenizers:
                tokenizer.to(devices[0])
        progress = Progress(sum(shards.seconds(i) for i in todo), len(todo))
        wanted = [np.isin(union.numbers, part.numbers) for part in chosen]
        jobs = ((i, _job(shards, i, wanted, self._stems(i))) for i in todo)
        for i, records in self._results(tokenizers, jobs, nj, num_threads, devices):
            for mark, record in zip(marks, records, strict=True):
                mark.write(i, record)
            progress.add(shards.seconds(i))
        if part is not None:
            return []
        return [
            self._merge(
                tokenizer, [mark.read(i) for i in range(len(shards))], everyone, share
            )
            for tokenizer, mark, share in zip(
                tokenizers, marks, agreements, strict=True
            )
        ]

    def _compare(
        self, tokenizer: Tokenizer, utterances: Sequence[Utterance], device: str
    ) -> float | None:
        """Compare the codes of some utterances with those of float32, and say it.

        It is done on the device of the workers, whose lower precision may be another
        than that of the CPU; the tokenizer is left on the CPU.
        """
        options = tokenizer.options
        if options.dtype == "float32":
            return None
        step = max(1, len(utterances) // AGREEMENT_UTTERANCES)
        some = utterances[::step][:AGREEMENT_UTTERANCES]
        tokenizer.to(device)
        share = tokenizer.agreement(some)
        tokenizer.to("cpu")  # the memory is that of the workers
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        if math.isnan(share):
            logging.warning(
                f"{options.name}: the codes in {options.dtype} were NOT compared with "
                f"those of float32: the teacher has no output of any of {len(some)} "
                f"utterances; see the reasons in {self.folder}/{options.name}.failed"
            )
            return share
        measured = (
            f"{options.name}: {100 * share:.1f} % of the codes of {len(some)} "
            f"utterances in {options.dtype} on {device} are those of float32"
        )
        if share < self.min_agreement:
            raise TeacherError(
                f"{measured}, less than the {100 * self.min_agreement:g} % of "
                "--min_agreement: nothing was tokenized; compute in float32, or "
                "accept it by a smaller --min_agreement"
            )
        if share < LOW_AGREEMENT:
            logging.warning(f"{measured}: FEW; the students learn other targets")
        else:
            logging.info(measured)
        return share

    def _marks(
        self,
        tokenizers: Sequence[Tokenizer],
        utterances: Sequence[Sequence[Utterance]],
        part: Part,
    ) -> list[DoneMarks]:
        """Done marks of this run, those of others removed with their shards."""
        digest = hashlib.sha256()
        for tokenizer, chosen in zip(tokenizers, utterances, strict=True):
            options = {
                **asdict(tokenizer.options),
                "quantizer": sha256_of(tokenizer.options.quantizer),
                "folder": str(self.folder),
                "seconds": [self.batch_seconds, self.shard_seconds],
            }
            del options["max_frames"]  # the search does not depend on it
            digest.update(fingerprint(tokenizer.teacher, chosen, options).encode())
        marks = [
            DoneMarks(self.folder / options.name, "codes", digest.hexdigest())
            for options in self.teachers
        ]
        for mark, options in zip(marks, self.teachers, strict=True):
            mark.clear_stale(part)
            (self.folder / f"{options.name}.scp").unlink(missing_ok=True)
        return marks

    def _results(
        self,
        tokenizers: Sequence[Tokenizer],
        jobs: Iterable[tuple[int, tuple]],
        nj: int,
        num_threads: int,
        devices: Sequence[str],
    ) -> Iterator[tuple[int, list[dict]]]:
        if nj <= 1:
            for i, job in jobs:
                torch.set_num_threads(num_threads)
                yield i, tokenize_shard(tokenizers, *job)
            return
        with ProcessPoolExecutor(
            nj,
            mp_context=get_context("spawn"),
            initializer=start_worker,
            initargs=(self.teachers, devices, num_threads),
        ) as pool:
            futures: dict[Future[list[dict]], int] = {}
            try:
                for i, job in jobs:
                    futures[pool.submit(work, *job)] = i
                    # Not all at once, so that memory does not grow with their number.
                    if len(futures) >= 3 * nj:
                        ready, _ = wait(futures, return_when=FIRST_COMPLETED)
                        for future in ready:
                            yield futures.pop(future), future.result()
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
        everyone: UtteranceTable,
        agreement: float | None,
    ) -> dict[str, Any]:
        name = tokenizer.options.name
        failed = [failure for record in records for failure in record["failed"]]
        codes: Spool[tuple[str, str]] = Spool(folder=self.folder)
        for i in range(len(records)):
            for row in scp_lines(self.folder / name / f"codes.{i}.scp"):
                codes.add(row)
        quantizer, teacher = tokenizer.quantizer, tokenizer.teacher
        write_text(
            self.folder / f"{name}.failed",
            "".join(f"{utt} {reason}\n" for utt, reason in failed),
        )
        for utt, reason in failed:
            logging.warning(f"skipped {utt}: {reason}")
        if failed and not len(codes):
            raise TeacherError(
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
            "passes": quantizer.passes(tokenizer.options.refine_iters),
            "extra_passes": tokenizer.options.extra_passes,
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
            unknown = math.isnan(agreement)
            summary["float32_agreement"] = None if unknown else agreement
        write_text(self.folder / f"{name}.json", json.dumps(summary, indent=1) + "\n")
        rows = iter(codes)
        row = next(rows, None)
        scp = TableWriter(self.folder / f"{name}.scp")
        for utterance in everyone:  # in the order of names, as the rows
            if row is not None and row[0] == utterance.utt:
                scp.add(*row)
                row = next(rows, None)
            else:
                scp.add(utterance.utt, missing)
        scp.finish()
        codes.close()
        return summary


def _job(
    shards: Shards, number: int, wanted: Sequence[np.ndarray], stems: Sequence[str]
) -> tuple[Batches, list[Collection[str]], Sequence[str]]:
    """What a worker is sent of a shard: batches, names wanted by each teacher, files.

    Args:
        shards: of all.
        number: of the shard.
        wanted: for each teacher, bool (utterances,).
        stems: of each teacher's files.
    """
    batches = shards[number]
    places = [shards.batches.places(i) for i in shards.numbers(number)]
    names = [
        {
            utterance.utt
            for batch, where in zip(batches, places, strict=True)
            for utterance, is_wanted in zip(batch, mask[where], strict=True)
            if is_wanted
        }
        for mask in wanted
    ]
    return batches, names, stems

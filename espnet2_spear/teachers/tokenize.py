"""Turn audio into codes: teacher, then quantizer, over many shards and processes."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import current_process, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch

from espnet2_spear.fileio.kaldi_ark import CodesWriter, read_scp, write_missing_codes
from espnet2_spear.mvq.abs_quantizer import AbsQuantizer
from espnet2_spear.mvq.files import load_quantizer
from espnet2_spear.teachers import build_teacher
from espnet2_spear.teachers.base import Teacher, TeacherError, difference
from espnet2_spear.teachers.extract import Utterance, embed_batch, make_batches
from espnet2_spear.teachers.shards import (
    Batches,
    DoneMarks,
    Progress,
    deal,
    duration,
    fingerprint,
    write_text,
)
from espnet2_spear.teachers.weights import sha256_of


@dataclass(frozen=True)
class TokenizeOptions:
    """What a tokenization depends on beside its audio.

    Attributes:
        teacher: name of the teacher, as for ``build_teacher``.
        teacher_conf: its options.
        quantizer: file of the quantizer.
        batch_seconds: bound of a batch's audio, padding included.
        shard_seconds: audio in a shard.
        refine_iters: passes of the quantizer's joint search; its own number for None.
    """

    teacher: str
    teacher_conf: dict[str, Any]
    quantizer: str
    batch_seconds: float = 20.0
    shard_seconds: float = 600.0
    refine_iters: int | None = None


def check_match(teacher: Teacher, quantizer: AbsQuantizer, path: str | Path) -> None:
    """Raise TeacherError if the quantizer was not trained on this teacher."""
    remedy = "train one on this teacher's embeddings (stage 4 of the recipe)"
    if quantizer.dim != teacher.dim:
        raise TeacherError(
            f"{path}: is a quantizer of {quantizer.dim} dimensions, teacher "
            f"{teacher.name} gives {teacher.dim}; {remedy}"
        )
    if quantizer.codebook_size > 256:
        raise TeacherError(
            f"{path}: has {quantizer.codebook_size} entries in a codebook; codes are "
            "stored in a byte, so at most 256 can be used"
        )
    trained_on = quantizer.metadata.get("teacher")
    if not trained_on:
        logging.warning(f"{path}: does not say on which teacher it was trained")
    elif differs := difference(trained_on, teacher.describe()):
        raise TeacherError(
            f"{path}: was trained on another teacher ({differs}); {remedy}"
        )


class Tokenizer:
    """A teacher and its quantizer on a device."""

    def __init__(self, options: TokenizeOptions, device: str = "cpu") -> None:
        self.options = options
        teacher = build_teacher(options.teacher, options.teacher_conf)
        quantizer = load_quantizer(options.quantizer)
        check_match(teacher, quantizer, options.quantizer)
        self.teacher = teacher.to(device)
        self.quantizer = quantizer.to(device).eval()

    def encode(
        self, batch: Sequence[Utterance], failed: list[tuple[str, str]]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (utterance, codes (T, N) uint8); append the others to ``failed``."""
        result = embed_batch(self.teacher, batch)
        failed += result.failed
        if not result.utts:
            return
        with torch.inference_mode():
            codes = self.quantizer.encode(
                torch.cat(result.frames), refine_iters=self.options.refine_iters
            )
        parts = codes.to(torch.uint8).cpu().split([len(x) for x in result.frames])
        for utterance, part in zip(result.utts, parts, strict=True):
            yield utterance.utt, part.numpy()


def _tokenize_shard(tokenizer: Tokenizer, batches: Batches, stem: str) -> dict:
    """Write one shard; returns the record of its done mark."""
    frames: int = 0
    failed: list[tuple[str, str]] = []
    with CodesWriter(f"{stem}.ark", f"{stem}.scp") as writer:
        for batch in batches:
            for utt, codes in tokenizer.encode(batch, failed):
                writer.write(utt, codes)
                frames += len(codes)
    return {
        "frames": frames,
        "failed": failed,
        "ark_bytes": os.path.getsize(f"{stem}.ark"),
    }


# Of a worker process; building a teacher for every shard would cost seconds.
_tokenizer: Tokenizer | None = None


def _start_worker(options: TokenizeOptions, devices: Sequence[str], threads: int):
    global _tokenizer
    # A worker whose run was killed would wait for ever, or write beside the next run.
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(threads)
    # Spawned workers are numbered from 1.
    number = int(current_process().name.rpartition("-")[2] or 0)
    _tokenizer = Tokenizer(options, devices[number % len(devices)])


def _follow_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(batches: Batches, stem: str) -> dict:
    assert _tokenizer is not None
    return _tokenize_shard(_tokenizer, batches, stem)


class TokenizeRun:
    """Tokenization of the utterances of one data set by one teacher.

    Writes ``<name>.<shard>.{ark,scp,done}`` and, when all are there, ``<name>.scp``
    with a line for every utterance in the order given, ``<name>.failed`` and
    ``<name>.json``. Utterances without codes (not to be tokenized, or failed) point
    to the row of -1 in ``<name>.missing.ark``.

    Args:
        options: what it depends on.
        output_dir: made if it is not there; lines of the scp files begin with it.
        name: of the teacher's role (``speech``, ``audio``).
    """

    def __init__(
        self, options: TokenizeOptions, output_dir: str | Path, name: str
    ) -> None:
        self.options, self.folder, self.name = options, Path(output_dir), name

    def _stem(self, shard: int) -> str:
        return str(self.folder / f"{self.name}.{shard}")

    def _is_done(self, marks: DoneMarks, shard: int) -> bool:
        record, stem = marks.read(shard), self._stem(shard)
        if record is None or not os.path.exists(f"{stem}.scp"):
            return False
        ark = Path(f"{stem}.ark")
        return ark.exists() and ark.stat().st_size == record["ark_bytes"]

    def run(
        self,
        utterances: Sequence[Utterance],
        everyone: Sequence[str],
        nj: int = 1,
        num_threads: int = 1,
        devices: Sequence[str] = ("cpu",),
    ) -> dict[str, Any]:
        """Tokenize.

        Args:
            utterances: those to tokenize.
            everyone: names of all utterances, in the order of the scp file.
            nj: number of processes; 1 works in this one.
            num_threads: of each process.
            devices: processes are dealt out to them.

        Returns:
            what ``<name>.json`` holds: teacher, quantizer, counts.

        Raises:
            TeacherError: teacher and quantizer do not match.
            ValueError: not one of the utterances could be tokenized.
        """
        # Built here in any case, so that errors come before work is dealt out.
        tokenizer = Tokenizer(self.options, devices[0] if nj == 1 else "cpu")
        options = {
            **asdict(self.options),
            "quantizer": sha256_of(Path(self.options.quantizer)),
            "folder": str(self.folder),
        }
        run = fingerprint(tokenizer.teacher, utterances, options)
        marks = DoneMarks(self.folder, self.name, run)
        marks.clear_stale()
        scp = self.folder / f"{self.name}.scp"
        scp.unlink(missing_ok=True)
        batches = make_batches(utterances, self.options.batch_seconds)
        shards = deal(batches, self.options.shard_seconds)
        todo = [i for i in range(len(shards)) if not self._is_done(marks, i)]
        if len(todo) < len(shards):
            logging.info(f"{len(shards) - len(todo)} of {len(shards)} shards are done")
        progress = Progress(sum(duration(shards[i]) for i in todo), len(todo))
        nj = min(nj, len(todo))
        for i, record in self._results(
            tokenizer, shards, todo, nj, num_threads, devices
        ):
            marks.write(i, record)
            progress.add(duration(shards[i]))
        records = [marks.read(i) for i in range(len(shards))]
        return self._merge(tokenizer, records, everyone, scp)

    def _results(
        self,
        tokenizer: Tokenizer,
        shards: Sequence[Batches],
        todo: Sequence[int],
        nj: int,
        num_threads: int,
        devices: Sequence[str],
    ) -> Iterator[tuple[int, dict]]:
        if nj <= 1:
            if todo:
                torch.set_num_threads(num_threads)
            for i in todo:
                yield i, _tokenize_shard(tokenizer, shards[i], self._stem(i))
            return
        with ProcessPoolExecutor(
            nj,
            mp_context=get_context("spawn"),
            initializer=_start_worker,
            initargs=(self.options, devices, num_threads),
        ) as pool:
            jobs = {pool.submit(_work, shards[i], self._stem(i)): i for i in todo}
            try:
                for job in as_completed(jobs):
                    yield jobs[job], job.result()
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
        scp: Path,
    ) -> dict[str, Any]:
        failed = [failure for record in records for failure in record["failed"]]
        codes: dict[str, str] = {}
        for i in range(len(records)):
            codes.update(read_scp(f"{self._stem(i)}.scp"))
        quantizer, teacher = tokenizer.quantizer, tokenizer.teacher
        write_text(
            self.folder / f"{self.name}.failed",
            "".join(f"{utt} {reason}\n" for utt, reason in failed),
        )
        for utt, reason in failed:
            logging.warning(f"skipped {utt}: {reason}")
        if failed and not codes:
            raise ValueError(
                f"{self.folder}/{self.name}.failed: none of the {len(failed)} "
                "utterances could be tokenized; see the reasons there"
            )
        missing = write_missing_codes(
            self.folder / f"{self.name}.missing.ark", quantizer.num_codebooks
        )
        summary = {
            "teacher": teacher.describe(),
            "quantizer": self.options.quantizer,
            "quantizer_id": quantizer.identity,
            "quantizer_kind": quantizer.kind,
            "frame_rate": teacher.frame_rate,
            "num_codebooks": quantizer.num_codebooks,
            "codebook_size": quantizer.codebook_size,
            "frames": sum(record["frames"] for record in records),
            "tokenized": len(codes),
            "failed": len(failed),
            "not_asked_for": len(everyone) - len(codes) - len(failed),
        }
        write_text(
            self.folder / f"{self.name}.json", json.dumps(summary, indent=1) + "\n"
        )
        lines = (f"{utt} {codes.get(utt, missing)}\n" for utt in everyone)
        write_text(scp, "".join(lines))
        return summary

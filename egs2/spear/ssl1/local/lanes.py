"""Long commands, some at once, that end with the program which started them."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Job:
    """Commands that run one after another.

    Attributes:
        name: for people.
        commands: lists of words.
        log: gets all that they print, behind what is there.
        folder: that they run in.
    """

    name: str
    commands: Sequence[Sequence[str]]
    log: Path
    folder: Path = Path(".")


class Lanes:
    """Runs jobs, ``count`` at once; says when one ends and how long the rest takes.

    Args:
        count: of jobs at once.
        gpus: names for CUDA_VISIBLE_DEVICES, which the jobs at once share out; none:
            jobs see what this process sees.

    Attributes:
        finished: jobs that ended well.
    """

    def __init__(self, count: int, gpus: Sequence[str] = ()) -> None:
        self.count = count
        self.finished: list[Job] = []
        self._free_gpus = [
            ",".join(gpus[i::count]) or gpus[i % len(gpus)]
            for i in range(count if gpus else 0)
        ]
        self._running: set[subprocess.Popen] = set()
        self._stopped = False

    def run(self, jobs: Sequence[Job]) -> str:
        """Run all jobs; the others go on when one fails.

        Returns:
            Names of those that have failed, in a sentence; empty if none has.

        Raises:
            SystemExit: a SIGTERM came.
        """
        signal.signal(signal.SIGTERM, _exit_once)
        start, failed = time.monotonic(), []
        # Minutes. Jobs that were finished before take seconds; they soon drop out.
        recent: deque[float] = deque(maxlen=2 * self.count)
        with ThreadPoolExecutor(self.count) as pool:
            try:
                waiting = {pool.submit(self._run, job): job for job in jobs}
                for done, future in enumerate(as_completed(waiting), 1):
                    job, (error, minutes) = waiting[future], future.result()
                    passed = (time.monotonic() - start) / 60
                    recent.append(minutes)
                    mean = sum(recent) / len(recent)
                    left = len(jobs) - done
                    rest = mean * left / max(1, min(self.count, left))
                    if error:
                        failed.append(job.name)
                    else:
                        self.finished.append(job)
                    print(
                        f"{job.name}: {error or 'done'} ({done} of {len(jobs)} in "
                        f"{passed:.1f} minutes, about {rest:.0f} minutes left)",
                        flush=True,
                    )
            except BaseException:
                self._stop()
                raise
        if not failed:
            return ""
        return f"{len(failed)} of {len(jobs)} failed: {', '.join(failed)}"

    def _run(self, job: Job) -> tuple[str, float]:
        """Run a job; returns what went wrong, or nothing, and the minutes it took."""
        start = time.monotonic()
        environment = dict(os.environ)
        # Taken in one call: other threads take theirs at the same time.
        gpu = self._free_gpus.pop() if self._free_gpus else None
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        error = self._run_commands(job, environment)
        if gpu is not None:
            self._free_gpus.append(gpu)
        return error, (time.monotonic() - start) / 60

    def _run_commands(self, job: Job, environment: Mapping[str, str]) -> str:
        """Run its commands; returns what went wrong, or nothing."""
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("a", encoding="utf-8") as stream:
            for command in job.commands:
                if self._stopped:
                    return "stopped"
                print("#", shlex.join(command), file=stream, flush=True)
                # A session of its own: a signal reaches all that the command starts.
                process = subprocess.Popen(
                    command,
                    cwd=job.folder,
                    env=environment,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                self._running.add(process)
                if self._stopped:  # since the check above
                    self._stop()
                status = process.wait()
                self._running.discard(process)
                if status:
                    lines = job.log.read_text(errors="replace").splitlines()
                    return f"FAILED, see {job.log}: {lines[-1]}"
        return ""

    def _stop(self) -> None:
        self._stopped = True
        for process in list(self._running):
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, signal.SIGTERM)


def visible_gpus() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES may call the GPUs that this process sees."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def _exit_once(number: int, _: object) -> None:
    """Signal handler: end once, undisturbed by a signal that follows."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)

"""Ranks of a distributed training: they end together, and none waits for a dead one."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

EXIT_RANK_LOST = 76
BEATS = 8  # of a rank, in the time after which its silence counts


@contextlib.contextmanager
def destroy_process_group_on_exit() -> Iterator[None]:
    """Within it, a process group may be made; it ends with the block.

    Gloo's threads take Python's lock to let go of the tensors of a collective. If the
    process ends meanwhile, they abort it (exit status -6), although all is done; if
    the group goes with its last user, which is DistributedDataParallel, it waits for
    these threads while it holds the lock that they wait for, for ever. So its users go
    first, those in the locals of a finished training too, and then the group.
    Whoever leaves by an error leaves the group as it is: its end could wait for ranks
    that no longer answer.
    """
    # Its functions keep the group of the moment of its import, as default arguments.
    # Imported later (optimizers do it), they would hold the group beyond its end.
    importlib.import_module("torch.distributed.nn")
    try:
        yield
    except SystemExit as error:
        traceback.clear_frames(error.__traceback__)
        _destroy_process_group()
        raise
    _destroy_process_group()


def _destroy_process_group() -> None:
    if dist.is_initialized():
        gc.collect()  # users that refer to themselves
        dist.destroy_process_group()


@contextlib.contextmanager
def watch_ranks(args: argparse.Namespace) -> Iterator[None]:
    """End this process with a message when another rank dies or hangs while inside.

    From the moment on in which the ranks have found each other: building models and
    indexes takes minutes, in which one may die.

    Args:
        args: ESPnet's options and ``rank_timeout``, seconds of silence after which a
            rank counts as dead; 0: nobody watches.
    """
    if not args.distributed or args.rank_timeout <= 0:
        yield
        return
    monitor = RankMonitor(Path(args.output_dir) / ".ranks", args.rank_timeout)
    monitor.start()
    failure = ""
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"
        if dist.is_initialized():
            logging.error(
                f"rank {dist.get_rank()} of {dist.get_world_size()} fails ({error}). "
                "If this is an error of communication, another rank has died: look at "
                "the others' logs"
            )
        raise
    finally:
        monitor.finish(failure)


class RankMonitor(threading.Thread):
    """Beats for its own rank and listens to the others'.

    Backends notice a dead rank only if its sockets are closed (gloo) or after half an
    hour (NCCL's and gloo's time limits); a node without power closes nothing. So every
    rank has a file, whose time it sets again and again; rank 0 watches all, the others
    watch rank 0. A rank that falls silent, or whose file says that it failed, ends this
    process with ``EXIT_RANK_LOST`` and a message, whatever its main thread is waiting
    for. A file is removed when its rank is done. Only changes count: whatever clocks
    say, and whatever an earlier training left.

    Args:
        folder: of the files, which all ranks see.
        timeout: seconds of silence after which a rank counts as lost.
    """

    def __init__(self, folder: Path, timeout: float) -> None:
        super().__init__(name="rank-monitor", daemon=True)
        self.folder, self.timeout = folder, timeout
        folder.mkdir(parents=True, exist_ok=True)
        self._before = {path.name: _look(path) for path in folder.iterdir()}
        self._end = threading.Event()

    def run(self) -> None:
        """Wait for the process group; beat and listen until :meth:`finish`."""
        while not dist.is_initialized():
            if self._end.wait(0.05):
                return
        rank = dist.get_rank()
        watched = range(1, dist.get_world_size()) if rank == 0 else [0]
        heard = {r: (self._before.get(str(r)), 0) for r in watched}
        own, begun = self._file(rank), False
        while not self._end.is_set():
            # What a file system refuses for a moment is done a moment later.
            with contextlib.suppress(OSError):
                if not begun:  # it may say how an earlier training failed
                    own.write_text("")
                    begun = True
                own.touch()
                self._listen(heard)
            self._end.wait(self.timeout / BEATS)

    def _listen(self, heard: dict[int, tuple[_State, int]]) -> None:
        """Look at the files of ranks.

        Silence is counted in own beats: while the file system pauses, nobody can beat.

        Args:
            heard: rank -> its last state and own beats since that was new; ranks that
                are done are taken out.
        """
        for rank, (before, beats) in list(heard.items()):
            state = _look(self._file(rank))
            if state == before:
                heard[rank] = (state, beats + 1)
                if beats >= BEATS:
                    self._exit(f"rank {rank} has been silent for {self.timeout:.0f} s")
            elif state is None:
                del heard[rank]
            elif failure := state[1]:
                self._exit(f"rank {rank} failed: {failure[:300]}")
            else:
                heard[rank] = (state, 0)

    def finish(self, failure: str) -> None:
        """Stop; tell the others that this rank is done, or why it failed."""
        self._end.set()
        self.join(self.timeout)
        if failure:
            self._tell(failure)
        elif dist.is_initialized():
            self._file(dist.get_rank()).unlink(missing_ok=True)

    def _file(self, rank: int) -> Path:
        return self.folder / str(rank)

    def _tell(self, failure: str) -> None:
        if dist.is_initialized():
            with contextlib.suppress(OSError):
                own = self._file(dist.get_rank())
                own.write_text(failure, encoding="utf-8", errors="replace")

    def _exit(self, reason: str) -> None:
        if self._end.is_set():
            return
        logging.error(
            f"rank {dist.get_rank()} ends, because {reason}. Look at that rank's log; "
            "then start all again: they resume from the last checkpoint. (Ranks hear "
            f"each other by files in {self.folder}, which all machines have to see)"
        )
        sys.stderr.flush()
        self._tell(f"because {reason}")
        os._exit(EXIT_RANK_LOST)


_State = tuple[int, str] | None


def _look(path: Path) -> _State:
    """Time and text of a file; None if it is not there.

    It is opened, because a network file system asks its server only then.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return os.fstat(file.fileno()).st_mtime_ns, file.read()
    except FileNotFoundError:
        return None

"""Notices ranks of a distributed training that died or hang, and ends the others."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch.distributed as dist
from espnet2.train.distributed_utils import get_master_addr, get_master_port

EXIT_RANK_LOST = 76
_DONE, _FAILED = "done", "failed: "
_KEY = "spear_heartbeat/"


class RankMonitor(threading.Thread):
    """Beats for its own rank and listens to the others'.

    Backends notice a dead rank only if its sockets are closed (gloo) or after half an
    hour (NCCL's and gloo's time limits); a node without power closes nothing. Rank 0
    watches all, the others watch rank 0, through a store that rank 0 serves. A rank
    that falls silent ends this process with ``EXIT_RANK_LOST`` and a message, whatever
    its main thread is waiting for.

    Args:
        rank: of this process.
        world_size: number of ranks.
        host: of the store.
        port: of the store.
        timeout: seconds of silence after which a rank counts as lost.
    """

    def __init__(
        self, rank: int, world_size: int, host: str, port: int, timeout: float
    ) -> None:
        super().__init__(name="rank-monitor", daemon=True)
        self.rank = rank
        self.timeout = timeout
        self.period = timeout / 8
        self.watched = list(range(1, world_size)) if rank == 0 else [0]
        self._heard = {r: ("", time.monotonic()) for r in self.watched}
        self._end = threading.Event()
        self._last_answer = time.monotonic()
        self._guard = threading.Thread(
            target=self._watch_store, name="rank-monitor-store", daemon=True
        )
        # A connection of its own: the process group's may be waiting for somebody.
        self._store = dist.TCPStore(
            host, port, is_master=False, timeout=timedelta(seconds=timeout)
        )

    def run(self) -> None:
        """Beat and listen until :meth:`finish`."""
        self._last_answer = time.monotonic()
        self._guard.start()
        beats = 0
        while not self._end.wait(self.period):
            beats += 1
            try:
                self._say(str(beats))
                lost = self._listen()
                self._last_answer = time.monotonic()
            except Exception as error:  # the store's process is gone
                # A training that ends everywhere takes the store along.
                if self._end.wait(self.period):
                    return
                lost = f"the connection to rank 0 is gone ({error})"
            if lost is not None and not self._end.is_set():
                self._exit(lost)

    def _watch_store(self) -> None:
        """End the process if the store, which rank 0 serves, answers no more.

        A frozen server leaves a caller waiting whatever time limit was set.
        """
        while not self._end.wait(self.period):
            silent = time.monotonic() - self._last_answer
            if silent > self.timeout:
                self._exit(f"rank 0 has been silent for {silent:.0f} s")

    def _exit(self, reason: str) -> None:
        logging.error(
            f"rank {self.rank} ends, because {reason}. Look at that rank's log; then "
            "start all again: they resume from the last checkpoint"
        )
        sys.stderr.flush()
        os._exit(EXIT_RANK_LOST)

    def finish(self, error: BaseException | None = None) -> None:
        """Stop; tell the others that this rank has ended, and with what."""
        self._end.set()
        self.join(self.timeout)
        if self.is_alive():  # waits for a store that does not answer
            return
        ended = error is None or isinstance(error, SystemExit)
        try:
            self._say(_DONE if ended else f"{_FAILED}{type(error).__name__}: {error}")
        except Exception:
            logging.info("rank 0 has ended before this rank")

    def _say(self, word: str) -> None:
        self._store.set(f"{_KEY}{self.rank}", word)

    def _listen(self) -> str | None:
        """What is wrong with the watched ranks; None: nothing."""
        now = time.monotonic()
        for rank in list(self.watched):
            key = f"{_KEY}{rank}"
            word = self._store.get(key).decode() if self._store.check([key]) else ""
            before, since = self._heard[rank]
            if word == _DONE:
                self.watched.remove(rank)
            elif word.startswith(_FAILED):
                lost = f"rank {rank} {word[:300]}"
                if self.rank == 0:  # which all others watch
                    self._say(f"{_FAILED}because {lost}")
                return lost
            elif word != before:
                self._heard[rank] = (word, now)
            elif now - since > self.timeout:
                lost = f"rank {rank} has been silent for {now - since:.0f} s"
                if self.rank == 0:
                    self._say(f"{_FAILED}because {lost}")
                return lost
        return None


@contextmanager
def monitor_ranks(
    rank: int, world_size: int, host: str | None, port: int | None, timeout: float
) -> Iterator[RankMonitor | None]:
    """Watch while inside; nothing for one rank or a timeout of 0.

    Args:
        rank: of this process.
        world_size: number of ranks.
        host: of the store that the process group was made with; None if it was made
            through a file (``--dist_init_method file://``): rank 0 then serves a store.
        port: of that store.
        timeout: seconds of silence after which a rank counts as lost.
    """
    if world_size < 2 or timeout <= 0:
        yield None
        return
    served = None  # lives until the end of this block
    if host is None or port is None:
        if rank == 0:
            served = dist.TCPStore(
                socket.gethostname(), 0, is_master=True, wait_for_workers=False
            )
        address = [(served.host, served.port) if served else None]
        dist.broadcast_object_list(address, src=0)
        host, port = address[0]
    monitor = RankMonitor(rank, world_size, host, port, timeout)
    monitor.start()
    error = None
    try:
        yield monitor
    except BaseException as e:
        error = e
        if not isinstance(e, SystemExit):
            logging.error(
                f"rank {rank} of {world_size} fails ({e}). If this is an error of "
                "communication, another rank has died: look at the others' logs"
            )
        raise
    finally:
        monitor.finish(error)


def watch_ranks(
    args: argparse.Namespace,
) -> AbstractContextManager[RankMonitor | None]:
    """:func:`monitor_ranks` with ESPnet's options, for the process group there is."""
    if not (dist.is_available() and dist.is_initialized()):
        return nullcontext()
    host = port = None
    if args.dist_init_method == "env://":
        host = get_master_addr(args.dist_master_addr, args.dist_launcher)
        port = get_master_port(args.dist_master_port)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return monitor_ranks(rank, world_size, host, port, args.rank_timeout)

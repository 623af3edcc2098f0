"""Ranks of a distributed training: they end together, and none waits for a dead one."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from urllib.parse import urlparse

import torch.distributed as dist
from espnet2.train.distributed_utils import get_master_addr, get_master_port

EXIT_RANK_LOST = 76
_DONE, _FAILED = "done", "failed: "
_KEY = "spear_heartbeat/"


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
    method = args.dist_init_method
    if method == "env://":
        host = get_master_addr(args.dist_master_addr, args.dist_launcher)
        method = f"tcp://{host}:{get_master_port(args.dist_master_port)}"
    monitor = RankMonitor(method, args.rank_timeout)
    monitor.start()
    error = None
    try:
        yield
    except BaseException as e:
        error = e
        if dist.is_initialized() and not isinstance(e, SystemExit):
            logging.error(
                f"rank {dist.get_rank()} of {dist.get_world_size()} fails ({e}). If "
                "this is an error of communication, another rank has died: look at the "
                "others' logs"
            )
        raise
    finally:
        monitor.finish(error)


class RankMonitor(threading.Thread):
    """Beats for its own rank and listens to the others'.

    Backends notice a dead rank only if its sockets are closed (gloo) or after half an
    hour (NCCL's and gloo's time limits); a node without power closes nothing. Rank 0
    watches all, the others watch rank 0, through a store that rank 0 serves. A rank
    that falls silent ends this process with ``EXIT_RANK_LOST`` and a message, whatever
    its main thread is waiting for.

    Args:
        init_method: of the process group, ``tcp://host:port`` or ``file://path``.
        timeout: seconds of silence after which a rank counts as lost.
    """

    def __init__(self, init_method: str, timeout: float) -> None:
        super().__init__(name="rank-monitor", daemon=True)
        self.init_method = init_method
        self.timeout = timeout
        self.period = timeout / 8
        self.rank = 0
        self._watched: list[int] = []
        self._heard: dict[int, tuple[str, float]] = {}
        self._end = threading.Event()
        self._last_answer = time.monotonic()
        self._store: dist.Store | None = None
        self._served: dist.Store | None = None

    def run(self) -> None:
        """Wait for the process group; beat and listen until :meth:`finish`."""
        while not dist.is_initialized():
            if self._end.wait(0.05):
                return
        self.rank = dist.get_rank()
        self._last_answer = time.monotonic()
        # Before the first call of the store: rank 0 may be frozen already.
        threading.Thread(
            target=self._watch_store, name="rank-monitor-store", daemon=True
        ).start()
        self._connect()
        self._last_answer = time.monotonic()
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

    def finish(self, error: BaseException | None = None) -> None:
        """Stop; tell the others that this rank has ended, and with what."""
        self._end.set()
        self.join(self.timeout)
        if self.is_alive() or not dist.is_initialized():
            return  # waits for a store that does not answer, or never began
        ended = error is None or isinstance(error, SystemExit)
        try:
            if self._store is None:
                self._connect()
            self._say(_DONE if ended else f"{_FAILED}{type(error).__name__}: {error}")
        except Exception:
            logging.info("rank 0 has ended before this rank")

    def _connect(self) -> None:
        """Open a connection of its own: the group's may be waiting for somebody."""
        self.rank, world_size = dist.get_rank(), dist.get_world_size()
        self._watched = list(range(1, world_size)) if self.rank == 0 else [0]
        self._heard = {r: ("", time.monotonic()) for r in self._watched}
        url = urlparse(self.init_method)
        host, port = url.hostname, url.port
        if url.scheme == "file":  # no store is served: rank 0 does, and writes where
            addresses = dist.FileStore(f"{url.path}.monitor", world_size)
            if self.rank == 0:
                self._served = dist.TCPStore(
                    socket.gethostname(), 0, is_master=True, wait_for_workers=False
                )
                addresses.set("port", f"{self._served.host}:{self._served.port}")
            host, port = addresses.get("port").decode().rsplit(":", 1)
        self._store = dist.TCPStore(
            host, int(port), is_master=False, timeout=timedelta(seconds=self.timeout)
        )

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

    def _say(self, word: str) -> None:
        self._store.set(f"{_KEY}{self.rank}", word)

    def _listen(self) -> str | None:
        """What is wrong with the watched ranks; None: nothing."""
        now = time.monotonic()
        for rank in list(self._watched):
            key = f"{_KEY}{rank}"
            word = self._store.get(key).decode() if self._store.check([key]) else ""
            before, since = self._heard[rank]
            lost = None
            if word == _DONE:
                self._watched.remove(rank)
            elif word.startswith(_FAILED):
                lost = f"rank {rank} {word[:300]}"
            elif word != before:
                self._heard[rank] = (word, now)
            elif now - since > self.timeout:
                lost = f"rank {rank} has been silent for {now - since:.0f} s"
            if lost is not None:
                if self.rank == 0:  # which all others watch
                    self._say(f"{_FAILED}because {lost}")
                return lost
        return None

"""Requests to stop: SIGTERM as schedulers send it before they take a node away."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch.multiprocessing import ProcessExitedException

# EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again.
EXIT_INTERRUPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Seconds that a loader's worker outlives a signal: longer than the training needs for
# its step and its checkpoint, shorter than a worker should hang behind it.
_WORKER_GRACE = 600


class Interrupted(SystemExit):
    """A training that was asked to stop has written its checkpoint and ends."""

    def __init__(self) -> None:
        super().__init__(EXIT_INTERRUPTED)


class StopRequest:
    """Remembers that a signal asked for an end."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listen(self) -> Iterator[StopRequest]:
        """Catch the signals while inside; only possible in a main thread."""

        def handle(number: int, frame: object) -> None:
            logging.warning(
                f"{signal.Signals(number).name}: a checkpoint is written after this "
                "step, then the training ends"
            )
            self.requested = True

        with _handlers(handle):
            yield self


@contextmanager
def forward_signals_to_ranks() -> Iterator[None]:
    """Pass signals on to the ranks that this process has spawned and waits for.

    ESPnet starts the ranks of one machine so (``--multiprocessing_distributed``). The
    process would else die at once, and its ranks would train on without it.

    Raises:
        Interrupted: the ranks have written their checkpoint and ended.
    """

    def handle(number: int, frame: object) -> None:
        ranks = multiprocessing.active_children()
        for rank in ranks:
            if rank.pid is not None:
                os.kill(rank.pid, number)
        if not ranks:  # nothing runs yet, or only this process
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    with _handlers(handle):
        try:
            yield
        except ProcessExitedException as error:
            if error.exit_code == EXIT_INTERRUPTED:
                raise Interrupted from None
            raise


def survive_signals(then: Callable[[int], None] | None) -> Callable[[int], None]:
    """worker_init_fn for torch's DataLoader that lets workers outlive a signal.

    Schedulers signal all processes of a job. The training still needs its workers until
    it has stopped, and ends them itself; the alarm is for when it cannot.

    Args:
        then: the loader's own function.
    """
    return partial(_set_handlers, then)


def _set_handlers(then: Callable[[int], None] | None, worker_id: int) -> None:
    for number in SIGNALS:  # after torch has set its own handler
        signal.signal(number, lambda *_: signal.alarm(_WORKER_GRACE))
    if then is not None:
        then(worker_id)


@contextmanager
def _handlers(handle: Callable[[int, object], None]) -> Iterator[None]:
    try:
        before = {number: signal.signal(number, handle) for number in SIGNALS}
    except ValueError:  # not the main thread
        logging.warning("not in a main thread: signals to stop are not caught")
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

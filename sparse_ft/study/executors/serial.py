"""Jobs one after another, in the driver's own process."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sparse_ft.cell.failures import CellTimeoutError, classify
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.executors.pool import ProgressMessages
from sparse_ft.study.jobs import Job, Outcome
from sparse_ft.study.queue import Listener, Queue
from sparse_ft.study.worker import WorkerSetup, close_lost
from sparse_ft.tracking.runs import Tracker

__all__ = ["SerialExecutor", "start"]

_AGAIN_SECONDS = 5.0  # long enough to log a failure in between


def start(config: SweepConfig, setup: WorkerSetup, listen: Listener, workers: int, logs: Path) -> SerialExecutor:
    """The executor as a configuration asks for it."""
    return SerialExecutor(setup, listen, config.cell_seconds)


class SerialExecutor:
    """Runs everything here: nothing to start, one model in memory, Ctrl-C goes straight to the cell.

    Args:
        setup: of the one worker.
        listen: told what happens.
        cell_seconds: longest time for a cell; None for no limit.
    """

    def __init__(self, setup: WorkerSetup, listen: Listener, cell_seconds: float | None = None):
        self._worker, self._listen, self._limit = setup.build(), listen, cell_seconds
        self._setup, self._tracker = setup, Tracker(setup.tracking_uri)
        self.workers = 1

    def run(self, queue: Queue) -> None:
        """Runs the queue empty."""
        while (job := queue.take(0)) is not None:
            self._listen.started(0, job)
            outcome = self._run(job)
            if outcome.breaks_worker:  # this process is the driver's: there is none to put in its place
                queue.retire(0, f"the device failed ({outcome.failure.message}), and this process can use it no more")
            self._listen.ended(0, outcome, queue.settle(0, outcome))

    def _run(self, job: Job) -> Outcome:
        began, run_ids = time.monotonic(), [""]
        try:
            with _limited(self._limit if job.is_cell else None) as start:

                def opened(run_id: str) -> None:  # what comes before is not the cell's fault
                    run_ids.append(run_id)
                    start()

                return self._worker.run(job, ProgressMessages(self._told), opened)
        except CellTimeoutError as error:  # in the very moment in which the worker had done with the cell
            seconds, parent = time.monotonic() - began, self._setup.parent_run_id
            return close_lost(self._tracker, parent, job, run_ids[-1], classify(error), seconds)

    def _told(self, message: tuple) -> None:
        kind, *values = message
        getattr(self._listen, kind)(0, *values)

    def close(self) -> None:
        self._worker.close()


@contextmanager
def _limited(seconds: float | None) -> Iterator[Callable[[], None]]:
    """Raises CellTimeoutError inside the block when its time is up: as soon as the interpreter has its turn, for
    one call into torch is not broken off. Only in the main thread, which alone receives signals. The time begins
    when what is yielded is called.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def stop(signum: int, frame: object) -> None:
        raise CellTimeoutError(f"the cell took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        yield lambda: _ring_after(seconds)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _ring_after(seconds: float) -> None:
    """Rings once more every few seconds: what is raised within a destructor or a library's callback gets lost."""
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_SECONDS)

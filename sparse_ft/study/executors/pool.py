"""What executors with workers of their own share: jobs go out, messages come in, lost workers are replaced.

A worker sends the messages ``("opened", run_id)``, ``("stage", stage, total, unit)``, ``("advanced", amount, note)``
and at last ``("ended", outcome)``. How they travel, and how a worker is started and killed, is a `WorkerHandle`'s.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

from sparse_ft.cell.failures import CellTimeoutError, WorkerLostError, classify
from sparse_ft.progress import Progress
from sparse_ft.study.jobs import Job, Outcome
from sparse_ft.study.queue import Listener, Queue
from sparse_ft.study.worker import WorkerSetup, close_lost
from sparse_ft.tracking.runs import Tracker

__all__ = ["ProgressMessages", "WorkerHandle", "WorkerPool"]

_EVERY = 0.2  # seconds between two reports of one worker's progress


class WorkerHandle(ABC):
    """The driver's end of one worker.

    Attributes:
        job: what it is running; None while it is idle.
        run_id: the job's run, as soon as the worker has said which.
        began: when it was given the job, by the monotonic clock.
        deadline: when it must have ended it; None for no limit.
    """

    def __init__(self) -> None:
        self.job: Job | None = None
        self.run_id, self.began = "", 0.0
        self.deadline: float | None = None

    def assign(self, job: Job) -> None:
        """Gives it a job."""
        self.job, self.run_id, self.began, self.deadline = job, "", time.monotonic(), None
        self.send(job)

    @abstractmethod
    def send(self, job: Job) -> None:
        """Sends the job to the worker."""

    @abstractmethod
    def messages(self) -> Iterator[tuple]:
        """What has come from the worker by now; raises WorkerLostError when it is gone and all was read."""

    @abstractmethod
    def kill(self, after: float = 0) -> None:
        """Ends the worker, whatever it is running; one that is ending by itself has ``after`` seconds for it."""

    @abstractmethod
    def dismiss(self) -> None:
        """Asks an idle worker to end by itself."""

    def is_alive(self) -> bool:
        """Whether it can be given a job."""
        return True


class WorkerPool(ABC):
    """Starts a worker when there is a job for it, gives each one job at a time, and replaces those that are lost.

    A worker's death (or its killing, when a cell takes too long) costs the cell it was running, nothing else.

    Args:
        setup: of every worker.
        listen: told what happens, in this process.
        workers: how many.
        cell_seconds: longest time for a cell; None for no limit.
    """

    exit_seconds: ClassVar[float] = 0.0  # that a dismissed worker has to end

    def __init__(self, setup: WorkerSetup, listen: Listener, workers: int, cell_seconds: float | None = None):
        self._setup, self._listen, self._limit = setup, listen, cell_seconds
        self.workers = workers
        self._handles: list[WorkerHandle | None] = [None] * workers
        self._tracker = Tracker(setup.tracking_uri)

    @abstractmethod
    def _start(self, number: int) -> WorkerHandle:
        """Starts a worker."""

    @abstractmethod
    def _wait(self, busy: Mapping[int, WorkerHandle]) -> None:
        """Returns when there may be messages, or a deadline has passed."""

    def run(self, queue: Queue) -> None:
        """Runs the queue empty."""
        while True:
            for number in range(self.workers):
                self._assign(queue, number)
            busy = {number: handle for number, handle in enumerate(self._handles) if handle and handle.job}
            if not busy:
                return
            self._wait(busy)
            for number, handle in busy.items():
                self._receive(queue, number, handle)

    def close(self) -> None:
        """Ends the workers that have nothing to do, kills the others; the runs that those had open are the caller's
        to end (a worker may not get round to it)."""
        handles = [handle for handle in self._handles if handle is not None]
        for handle in handles:
            if handle.job is None:
                handle.dismiss()
        for handle in sorted(handles, key=lambda handle: handle.job is None):  # nobody is waited for while one works
            handle.kill(after=self.exit_seconds if handle.job is None else 0)
        self._handles = [None] * self.workers

    def _assign(self, queue: Queue, number: int) -> None:
        handle = self._handles[number]
        if (handle is not None and handle.job is not None) or (job := queue.take(number)) is None:
            return
        if handle is None or not handle.is_alive():  # it may have died while it had nothing to do
            handle = self._handles[number] = self._start(number)
        handle.assign(job)
        self._listen.started(number, job)

    def _receive(self, queue: Queue, number: int, handle: WorkerHandle) -> None:
        try:
            for kind, *values in handle.messages():
                if kind == "opened":
                    (handle.run_id,) = values
                    if self._limit is not None and handle.job.is_cell:
                        handle.deadline = time.monotonic() + self._limit  # its start-up is not the cell's fault
                elif kind == "ended":
                    self._on_ended(queue, number, *values)
                    return
                else:
                    getattr(self._listen, kind)(number, *values)  # stage, advanced
        except WorkerLostError as error:
            self._on_lost(queue, number, handle, error)
            return
        if handle.deadline is not None and time.monotonic() >= handle.deadline:
            self._on_lost(queue, number, handle, CellTimeoutError(f"the cell took longer than {self._limit:g} s"))

    def _on_ended(self, queue: Queue, number: int, outcome: Outcome) -> None:
        self._handles[number].job = None
        if outcome.breaks_worker:  # its context on the device is lost: the next cell gets a new process
            self._drop(number)
        self._listen.ended(number, outcome, queue.settle(number, outcome))

    def _on_lost(self, queue: Queue, number: int, handle: WorkerHandle, error: BaseException) -> None:
        self._drop(number)
        job, seconds, parent = handle.job, time.monotonic() - handle.began, self._setup.parent_run_id
        run_id = handle.run_id or self._open_run(job)
        outcome = close_lost(self._tracker, parent, job, run_id, classify(error), seconds)
        self._listen.ended(number, outcome, queue.settle(number, outcome))

    def _drop(self, number: int) -> None:
        self._handles[number].kill()
        self._handles[number] = None

    def _open_run(self, job: Job) -> str:
        """The run of a job whose worker was lost before it could say which: no two workers have the same job."""
        open_runs = self._tracker.children(self._setup.parent_run_id, "RUNNING") if job.key_tag else []
        return next((run.run_id for run in open_runs if run.tags.get(job.key_tag) == job.key), "")


class ProgressMessages(Progress):
    """A worker's progress as messages to the driver, a few times a second."""

    def __init__(self, send: Callable[[tuple], None]) -> None:
        self._send, self._sent, self._amount, self._note = send, 0.0, 0.0, ""

    def start(self, stage: str, total: float, unit: str = "") -> None:
        self._amount, self._note = 0.0, ""
        self._send(("stage", stage, total, unit))

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._amount += amount
        self._note = note or self._note
        now = time.monotonic()
        if now - self._sent >= _EVERY:
            self._send(("advanced", self._amount, self._note))
            self._sent, self._amount = now, 0.0

    def stop(self) -> None:
        self._send(("stage", "", 0, ""))

"""The queue of jobs that an executor runs empty, and who listens to it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Protocol

from sparse_ft.cell.failures import NOT_THE_CELLS, RETRIED_AT_ONCE
from sparse_ft.study.jobs import Job, Outcome

_IN_A_ROW = 3  # failures of one kind after which a worker gets no more work
_NUMBERS = re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{8,}\b|\d+")  # addresses and Ray's ids among them
_AT_ONCE = 30.0  # seconds in which a cell fails that had no chance; a new process imports torch and mlflow in them

__all__ = ["Listener", "Queue", "RunningExecutor"]


class Listener:
    """Is told what the workers do, in the driver's process. This base class does nothing."""

    def started(self, worker: int, job: Job) -> None:
        """A worker took a job."""

    def stage(self, worker: int, stage: str, total: float, unit: str) -> None:
        """A worker's job came to a new stage of ``total`` steps; an empty stage is the end of one."""

    def advanced(self, worker: int, amount: float, note: str) -> None:
        """A worker's stage moved on."""

    def ended(self, worker: int, outcome: Outcome, over: bool = True) -> None:
        """A worker's job ended; where it is not over it will be tried again."""


class Queue:
    """The jobs of a phase: what waits, what runs, what came out. Only the driver's process holds it.

    A failed job is put back, behind all others, while its class allows another try (see `failures`) and it
    has had fewer than ``max_retries``. Out of memory is tried again once, with the batch halved.

    A worker whose jobs fail one after the other, at once and with the same words, in classes that need not be the
    cell's own, is retired: it would burn the whole queue. What then waits still has not been run; ``stopped`` says why.
    """

    def __init__(self, jobs: Iterable[Job], max_retries: int = 1):
        self._waiting: list[Job] = list(jobs)
        self._running: dict[int, Job] = {}
        self._last: dict[int, Job] = {}
        self._max_retries = max_retries
        self._streaks: dict[int, list[tuple[str, str]]] = {}
        self._retired: dict[int, str] = {}
        self.total = len(self._waiting)
        self.outcomes: list[Outcome] = []

    @property
    def running(self) -> Mapping[int, Job]:
        """Worker -> its job."""
        return dict(self._running)

    @property
    def left(self) -> int:
        """Jobs that have not ended for good."""
        return len(self._waiting) + len(self._running)

    @property
    def stopped(self) -> str:
        """Why jobs are left over that no worker takes any more; empty where none are."""
        return next(reversed(self._retired.values())) if self._waiting and self._retired else ""

    def retire(self, worker: int, reason: str) -> None:
        """Gives a worker nothing more."""
        self._retired[worker] = reason

    def take(self, worker: int) -> Job | None:
        """The next job for a worker; None while there is none.

        A worker stays with its model, so that it need not be loaded again, and away from masks that another
        worker is scoring just now, so that their untuned score is measured once.
        """
        if not self._waiting or worker in self._retired:
            return None
        last = self._last.get(worker)
        busy = {job.checksum for job in self._running.values()} - {None}
        models = {job.model for job in self._running.values()}

        def rank(number: int) -> tuple[bool, bool, bool, bool, int]:
            job = self._waiting[number]
            strange = last is None or job.model != last.model
            # A worker that changes models takes one that nobody has: two loads of one model are one too many.
            return job.attempt > 1, strange, strange and job.model in models, job.checksum in busy, number

        job = self._waiting.pop(min(range(len(self._waiting)), key=rank))
        self._running[worker] = self._last[worker] = job
        return job

    def settle(self, worker: int, outcome: Outcome) -> bool:
        """Takes back a worker's job. True: it is over; False: it will be tried again."""
        self._running.pop(worker, None)
        self._watch(worker, outcome)
        again = self._again(outcome)
        if again is not None:
            self._waiting.append(again)
            return False
        self.outcomes.append(outcome)
        return True

    def _watch(self, worker: int, outcome: Outcome) -> None:
        failure, streak = outcome.failure, self._streaks.setdefault(worker, [])
        counts = failure is not None and failure.kind in NOT_THE_CELLS
        if not counts or (failure.kind != "infrastructure" and outcome.seconds >= _AT_ONCE):
            streak.clear()
            return
        # Numbers and addresses differ from cell to cell; a store that is away has many words for it.
        words = "" if failure.kind == "infrastructure" else _NUMBERS.sub("#", failure.message)
        if streak and streak[-1] != (failure.kind, words):
            streak.clear()
        streak.append((failure.kind, words))
        if len(streak) >= _IN_A_ROW:
            self.retire(worker, f"{len(streak)} cells in a row failed alike ({failure.kind}: {failure.message})")

    def _again(self, outcome: Outcome) -> Job | None:
        job, failure = outcome.job, outcome.failure
        if failure is None or failure.kind not in RETRIED_AT_ONCE:
            return None
        if failure.kind == "out_of_memory":
            return job.halved()
        allowed = 1 + self._max_retries if job.allowed is None else job.allowed
        return job.again() if job.attempt < allowed else None


class RunningExecutor(Protocol):
    """What a study asks of its executor. ``workers`` jobs run at a time."""

    workers: int

    def run(self, queue: Queue) -> None:
        """Runs the queue empty; tells the listener what happens, and the queue how each job ended."""

    def close(self) -> None:
        """Ends the workers, at once, whatever they are at."""

"""What workers are given and what they give back, and the queue between them: the one protocol of all executors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from sparse_ft.cell.failures import BREAKS_WORKER, NOT_THE_CELLS, RETRIED_AT_ONCE, Failure
from sparse_ft.pruning.output import MaskFile
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.commands import MaskConfig

_IN_A_ROW = 3  # failures of one kind after which a worker gets no more work
_NUMBERS = re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{8,}\b|\d+")  # addresses and Ray's ids among them
_AT_ONCE = 30.0  # seconds in which a cell fails that had no chance; a new process imports torch and mlflow in them

__all__ = ["Job", "Listener", "MaskJob", "Outcome", "Queue", "Work", "breaks_worker", "halved"]


@dataclass(frozen=True)
class Job:
    """One cell to run, in a folder of its own.

    Attributes:
        cell: as it runs; after running out of memory its batch is smaller than the plan's.
        masks: None for a dense cell, and the failure to report where its masks could not be made.
        folder: for what the cell writes; removed when the run holds it.
        key: identity of the planned cell with its masks; see `sparse_ft.cell.identity.cell_key`.
        attempt: 1 for the first.
        tags: more tags for the run.
        allowed: attempts that it may come to; None leaves that to the `Queue`.
        name: in its study; by default the cell's own.
        identity: what the cell's names stood for when it was planned; empty where nobody planned it.
        planned: the cell as the plan has it, where it runs otherwise.
    """

    cell: CellConfig
    masks: MaskFile | Failure | None
    folder: Path
    key: str
    attempt: int = 1
    tags: Mapping[str, str] = field(default_factory=dict)
    allowed: int | None = None
    name: str = ""
    identity: Mapping[str, str] = field(default_factory=dict)
    planned: CellConfig | None = None

    @property
    def model(self) -> str:
        """The base model."""
        return self.cell.model

    @property
    def title(self) -> str:
        """A short name for people."""
        return self.name or self.cell.title


@dataclass(frozen=True)
class MaskJob:
    """One mask set to make: all levels of one kind of mask, into ``folder``."""

    config: MaskConfig
    name: str
    folder: Path
    key: str
    attempt: int = 1

    @property
    def model(self) -> str:
        """The base model."""
        return self.config.model

    @property
    def title(self) -> str:
        """A short name for people."""
        return f"masks {self.name}"


class Work(Protocol):
    """Anything that a worker can be given: a cell, a mask set, a trial of a search."""

    key: str
    attempt: int

    @property
    def model(self) -> str:
        """The base model, which a worker keeps in memory."""

    @property
    def title(self) -> str:
        """A short name for people."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its run, the status in MLflow's words, and why it failed.

    ``masks`` are the files of a finished mask job, ``seconds`` the wall time at the worker.
    """

    job: Work
    run_id: str
    status: str
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    failure: Failure | None = None
    masks: tuple[MaskFile, ...] = ()


class Listener:
    """Is told what the workers do, in the driver's process. This base class does nothing."""

    def started(self, worker: int, job: Work) -> None:
        """A worker took a job."""

    def stage(self, worker: int, stage: str, total: float, unit: str) -> None:
        """A worker's job came to a new stage of ``total`` steps; an empty stage is the end of one."""

    def advanced(self, worker: int, amount: float, note: str) -> None:
        """A worker's stage moved on."""

    def ended(self, worker: int, outcome: Outcome, over: bool = True) -> None:
        """A worker's job ended; where it is not over it will be tried again."""


def breaks_worker(outcome: Outcome) -> bool:
    """Whether the process that ran a job can run no other."""
    return outcome.failure is not None and outcome.failure.kind in BREAKS_WORKER


class Queue:
    """The jobs of a phase: what waits, what runs, what came out. Only the driver's process holds it.

    A failed job is put back, behind all others, while its class allows another try (see `failures`) and it
    has had fewer than ``max_retries``. Out of memory is tried again once, with the batch halved.

    A worker whose jobs fail one after the other, at once and with the same words, in classes that need not be the
    cell's own, is retired: it would burn the whole queue. What then waits still has not been run; ``stopped`` says why.
    """

    def __init__(self, jobs: Iterable[Work], max_retries: int = 1):
        self._waiting: list[Work] = list(jobs)
        self._running: dict[int, Work] = {}
        self._last: dict[int, Work] = {}
        self._max_retries = max_retries
        self._streaks: dict[int, list[tuple[str, str]]] = {}
        self._retired: dict[int, str] = {}
        self.total = len(self._waiting)
        self.outcomes: list[Outcome] = []

    @property
    def running(self) -> Mapping[int, Work]:
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

    def take(self, worker: int) -> Work | None:
        """The next job for a worker; None while there is none.

        A worker stays with its model, so that it need not be loaded again, and away from masks that another
        worker is scoring just now, so that their untuned score is measured once.
        """
        if not self._waiting or worker in self._retired:
            return None
        last = self._last.get(worker)
        busy = {_checksum(job) for job in self._running.values()} - {None}
        models = {job.model for job in self._running.values()}

        def rank(number: int) -> tuple[bool, bool, bool, bool, int]:
            job = self._waiting[number]
            strange = last is None or job.model != last.model
            # A worker that changes models takes one that nobody has: two loads of one model are one too many.
            return job.attempt > 1, strange, strange and job.model in models, _checksum(job) in busy, number

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

    def _again(self, outcome: Outcome) -> Work | None:
        job, failure = outcome.job, outcome.failure
        if failure is None or failure.kind not in RETRIED_AT_ONCE:
            return None
        if failure.kind == "out_of_memory":
            return halved(job) if isinstance(job, Job) else None
        allowed = job.allowed if isinstance(job, Job) else None
        if job.attempt >= (1 + self._max_retries if allowed is None else allowed):
            return None
        return replace(job, attempt=job.attempt + 1)


def halved(job: Job) -> Job | None:
    """The job with half the batch and twice the accumulation (the same examples in every step); None where
    that was done already or the batch is one."""
    cell, size = job.cell, job.cell.batch_size
    if "reduced_batch" in job.tags or size < 2:
        return None
    # Of an odd batch the largest part that leaves the optimizer's step as it was.
    smaller = max(part for part in range(1, size // 2 + 1) if size % part == 0)
    scored = cell.eval_batch_size
    cell = replace(
        cell,
        batch_size=smaller,
        gradient_accumulation=cell.gradient_accumulation * (size // smaller),
        eval_batch_size=max(1, scored // 2) if isinstance(scored, int) else scored,
    )
    tags = {**job.tags, "reduced_batch": f"{size} -> {smaller}"}
    return replace(job, cell=cell, planned=job.planned or job.cell, attempt=job.attempt + 1, tags=tags)


def _checksum(job: Work) -> str | None:
    return job.masks.checksum if isinstance(job, Job) and isinstance(job.masks, MaskFile) else None

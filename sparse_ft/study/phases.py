"""The phases of a study under its parent run: mask sets, cells, and the cells that compute the same as another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sparse_ft.cell.failures import Failure, classify
from sparse_ft.cell.identity import cell_key
from sparse_ft.cell.masks import mask_file, read_manifest
from sparse_ft.cell.record import log_cell_inputs
from sparse_ft.errors import UserError
from sparse_ft.pruning.output import MaskFile
from sparse_ft.settings.cell import CellConfig
from sparse_ft.study.display import Display
from sparse_ft.study.ledger import Ledger
from sparse_ft.study.plan import Plan
from sparse_ft.study.queue import Job, MaskJob, Outcome, Queue, halved
from sparse_ft.tracking.parameters import flatten_config
from sparse_ft.tracking.runs import Tracker

__all__ = ["Executor", "Hole", "Phases", "holes_table"]

Masks = dict[float, MaskFile] | Failure


class Executor(Protocol):
    """Where jobs run. ``workers`` of them at a time."""

    workers: int

    def run(self, queue: Queue) -> None:
        """Runs a queue empty."""

    def close(self) -> None:
        """Ends the workers, at once, whatever they are at."""


@dataclass(frozen=True)
class Hole:
    """A cell without a result."""

    title: str
    kind: str
    message: str
    run_id: str


@dataclass
class Phases:
    """What has come out so far.

    Attributes:
        plan: what is to be run.
        identities: of each cell, what its names stand for; see `sparse_ft.cell.identity.cell_identity`.
        mask_keys: of each mask set, its identity.
        ledger: what was done before this start.
        folder: the study's.
        tracker, parent: where it is logged.
        max_retries: see `Queue`.
        outcomes: of this start, in the order they ended.
        holes: filled as cells end without a result.
        stopped: why cells were left that nobody ran; empty where none were.
    """

    plan: Plan
    identities: list[dict[str, str]]
    mask_keys: list[str]
    ledger: Ledger
    folder: Path
    tracker: Tracker
    parent: str
    max_retries: int = 1
    outcomes: list[Outcome] = field(default_factory=list)
    holes: list[Hole] = field(default_factory=list)
    masks: list[Masks] = field(default_factory=list)
    stopped: str = ""

    def make_masks(self, executor: Executor) -> None:
        """Makes the mask sets that are not there yet, each once for all its cells."""
        jobs = []
        for item, key in zip(self.plan.mask_sets, self.mask_keys, strict=True):
            name = f"{item.name}-{key}"  # the identity in the folder's name: no two sets share one
            jobs.append(MaskJob(item.config, name, self.folder / "masks" / name, key))
        found = {job.key: self._found(job) for job in jobs}
        wanted = {job.key: job for job in jobs if found[job.key] is None}  # two names may stand for one set
        queue = Queue(wanted.values(), self.max_retries)
        executor.run(queue)
        for outcome in queue.outcomes:
            found[outcome.job.key] = outcome.failure or _by_level(outcome.masks)
        if queue.stopped:
            self.stopped = queue.stopped
            return
        self.masks = [found[job.key] for job in jobs]

    def run_cells(self, executor: Executor, display: Display) -> None:
        """Runs every cell that has no result and may get one."""
        if self.stopped:
            return
        jobs = [self._job(number) for number in range(len(self.plan.cells))]
        self._supersede(jobs)
        same_as = self._same_as(jobs)
        first = [job for job, same in zip(jobs, same_as, strict=True) if same is None]
        display.finished = sum(job.key in self.ledger.finished for job in jobs)
        waiting = []
        for job in first:
            if job.key in self.ledger.finished:
                continue
            again = self._again(job)
            if again is not None:
                waiting.append(again)
            else:
                self.holes.append(_hole_of(self.ledger.failed[job.key][-1]))
                display.recorded(failed=True)
        # Those that are tried again only because somebody asks come last: where they fail again, and stop the worker,
        # the others have been run.
        waiting.sort(key=lambda job: self.ledger.failure_class(job.key) in self.ledger.asked)
        queue = Queue(waiting, self.max_retries)
        display.awaits(job.cell for job in waiting)
        try:
            executor.run(queue)
        finally:
            self.outcomes += queue.outcomes
        self.holes += [_hole(outcome) for outcome in queue.outcomes if outcome.failure is not None]
        self.stopped = queue.stopped
        self._record_same(jobs, same_as, display)

    def _same_as(self, jobs: list[Job]) -> list[int | None]:
        """The plan's twins, and the cells under two names (``auto`` and the device it is) that are one computation."""
        first: dict[str, int] = {}
        return [
            same if same is not None else (first[job.key] if first.setdefault(job.key, number) != number else None)
            for number, (job, same) in enumerate(zip(jobs, self.plan.same_as, strict=True))
        ]

    def _supersede(self, jobs: list[Job]) -> None:
        """Marks the runs of earlier starts whose names are those of a cell of this plan, and whose weights, rows or
        program were others: they stay to be read, and are no part of this study's results any more. A run of an older
        version has fewer names."""
        planned = [(_named(flatten_config(job.cell.canonical())), job.key) for job in jobs
                   if not isinstance(job.masks, Failure)]  # fmt: skip
        keys = {key for _, key in planned}
        for run in self.ledger.cells:
            if run["tags"].get("cell_key") in keys or not (names := _named(run["params"])):
                continue
            if wanted := {key for cell, key in planned if names <= cell}:
                self.tracker.log(run["run_id"], tags={"superseded": ",".join(sorted(wanted))})

    def _again(self, job: Job) -> Job | None:
        """The job as it is to be run after what earlier starts say of it; None: it is not tried again.

        Each start tries a failed cell again up to ``max_retries`` times: whoever resumes has put something right.
        """
        failed = self.ledger.failed.get(job.key)
        if not failed:
            return job
        asked = self.ledger.failure_class(job.key) in self.ledger.asked
        if self.ledger.hopeless(job.key) is not None or (self.max_retries < 1 and not asked):
            return None
        job = replace(job, attempt=len(failed), allowed=len(failed) + max(self.max_retries, int(asked)))
        if self.ledger.ran_out_of_memory(job.key):
            return halved(job)
        return replace(job, attempt=job.attempt + 1)

    def _found(self, job: MaskJob) -> Masks | None:
        """The mask set of an earlier start: in the study's folder, else among the artifacts of its run."""
        run = self.ledger.masks.get(job.key)
        if run is None:
            return None
        files = read_manifest(job.folder)
        if files is None:
            fetched = job.folder.parent / f"{job.name}-run"
            fetched.mkdir(parents=True, exist_ok=True)
            try:
                files = read_manifest(self.tracker.fetch(run["run_id"], "masks", fetched))
            except UserError:
                return None
        return _by_level(files) if files else None

    def _job(self, number: int) -> Job:
        cell, made = self.plan.cells[number], self.plan.mask_set_of[number]
        masks: MaskFile | Failure | None = None
        if made is not None:
            of_set = self.masks[made]
            masks = of_set[cell.sparsity] if isinstance(of_set, dict) else of_set
        elif cell.pruned and cell.masks is not None:
            masks = _given(cell)
        identity = self.identities[number]
        key = cell_key(cell, identity, masks.checksum if isinstance(masks, MaskFile) else "")
        folder = self.folder / "cells" / key
        return Job(cell, masks, folder, key, name=self.plan.titles[number], identity=identity)

    def _record_same(self, jobs: list[Job], same_as: list[int | None], display: Display) -> None:
        """Runs of the cells that compute the same as another, tagged with its run: nothing is measured twice."""
        ended = {outcome.job.key: outcome for outcome in self.outcomes}
        for job, same in zip(jobs, same_as, strict=True):
            if same is None or self.ledger.has(job.key, flatten_config(job.cell.canonical())):
                continue
            outcome, before = ended.get(jobs[same].key), self.ledger.finished.get(jobs[same].key)
            if outcome is None and before is None:  # not run now, not finished then
                if job.key in self.ledger.failed:
                    self.holes.append(_hole_of(self.ledger.failed[job.key][-1]))
                    display.recorded(failed=True)
                continue
            twin = outcome.run_id if outcome is not None else before["run_id"]
            failure = outcome.failure if outcome is not None else None
            tags = {"kind": "cell", "cell_key": job.key, "same_as": twin}
            if isinstance(job.masks, MaskFile):
                tags["mask_checksum"] = job.masks.checksum
            if failure is not None:
                tags |= {"failure_class": failure.kind, "failure_message": failure.message}
            run_id = self.tracker.start_child(self.parent, job.title, tags)
            log_cell_inputs(self.tracker, run_id, job.cell, job.identity)
            self.tracker.finish(run_id, "FINISHED" if failure is None else "FAILED")
            display.recorded(failed=failure is not None)
            if failure is not None:
                self.holes.append(Hole(job.title, failure.kind, failure.message, run_id))


def holes_table(holes: list[Hole]) -> Table:
    """The cells without a result: what, why, and which run holds the traceback."""
    table = Table("cell", "why", "message", "run", title="holes", title_justify="left", box=SIMPLE_HEAD)
    for hole in holes:
        table.add_row(hole.title, hole.kind, hole.message, hole.run_id[:8])
    return table


def _named(params: Mapping[str, str]) -> frozenset:
    """A cell's configuration as its run holds it."""
    return frozenset(pair for pair in params.items() if pair[0].startswith("cfg/"))


def _by_level(files) -> dict[float, MaskFile]:
    return {file.sparsity: file for file in files}


def _given(cell: CellConfig) -> MaskFile | Failure:
    try:
        return mask_file(cell.masks).file
    except UserError as error:
        return classify(error)


def _hole(outcome: Outcome) -> Hole:
    return Hole(outcome.job.title, outcome.failure.kind, outcome.failure.message, outcome.run_id)


def _hole_of(run: dict[str, Any]) -> Hole:
    tags = run["tags"]
    return Hole(run["name"], tags.get("failure_class", "unknown"), tags.get("failure_message", ""), run["run_id"])

"""The phases of a study under its parent run: mask sets, cells, and the cells that compute the same as another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sparse_ft.cell.failures import RETRIED, Failure, classify
from sparse_ft.cell.identity import cell_key
from sparse_ft.cell.masks import mask_file, read_manifest
from sparse_ft.errors import UserError
from sparse_ft.pruning.output import MaskFile
from sparse_ft.study.display import Display
from sparse_ft.study.jobs import CellJob, Job, MaskJob, Outcome
from sparse_ft.study.plan import Plan, PlannedCell
from sparse_ft.study.queue import Queue, RunningExecutor
from sparse_ft.study.start import Start
from sparse_ft.tracking.parameters import flatten_config
from sparse_ft.tracking.record import Run, Tag
from sparse_ft.tracking.runs import Tracker

__all__ = ["Hole", "Phases", "holes_table"]

Masks = dict[float, MaskFile] | Failure


@dataclass(frozen=True)
class Hole:
    """A cell without a result."""

    title: str
    kind: str
    message: str
    run_id: str

    @classmethod
    def of_outcome(cls, outcome: Outcome) -> Hole:
        """From how its job ended just now."""
        return cls(outcome.job.title, outcome.failure.kind, outcome.failure.message, outcome.run_id)

    @classmethod
    def of_run(cls, run: Run) -> Hole:
        """From a run of an earlier start."""
        kind, message = run.tags.get(Tag.FAILURE_CLASS, "unknown"), run.tags.get(Tag.FAILURE_MESSAGE, "")
        return cls(run.name, kind, message, run.run_id)


@dataclass
class Phases:
    """What has come out so far.

    Attributes:
        plan: what is to be run, with its identities.
        start: the study's run and folder, and what was done before.
        tracker: where it is logged.
        max_retries: see `Queue`.
        outcomes: of this start's cells, in the order they ended.
        holes: filled as cells end without a result.
        masks: of each mask set of the plan, sparsity -> file, or why there are none.
        teachers: of each dense cell that teaches, by its number in the plan, its run, or why there is none.
        stopped: why cells were left that nobody ran; empty where none were.
    """

    plan: Plan
    start: Start
    tracker: Tracker
    max_retries: int = 1
    outcomes: list[Outcome] = field(default_factory=list)
    holes: list[Hole] = field(default_factory=list)
    masks: list[Masks] = field(default_factory=list)
    teachers: dict[int, Run | Failure] = field(default_factory=dict)
    stopped: str = ""

    def make_masks(self, executor: RunningExecutor) -> None:
        """Makes the mask sets that are not there yet, each once for all its cells."""
        jobs = []
        for item in self.plan.mask_sets:
            name = f"{item.name}-{item.key}"  # the identity in the folder's name: no two sets share one
            jobs.append(MaskJob(item.config, name, self.start.folder / "masks" / name, item.key))
        found = {job.key: self._found(job) for job in jobs}
        wanted = {job.key: job for job in jobs if found[job.key] is None}  # two names may stand for one set
        queue = Queue(wanted.values(), self.max_retries)
        executor.run(queue)
        for outcome in queue.outcomes:
            found[outcome.job.key] = outcome.failure or _by_level(outcome.masks)
        self.stopped = queue.stopped
        self.masks = [] if self.stopped else [found[job.key] for job in jobs]

    def masks_of(self, cell: PlannedCell) -> MaskFile | Failure | None:
        """A cell's masks, or why they could not be made; None: it needs none."""
        if cell.masks is not None:
            made = self.masks[cell.masks]
            return made if isinstance(made, Failure) else made[cell.config.sparsity]
        if not cell.config.pruned:
            return None
        try:
            return mask_file(cell.config.masks).file
        except UserError as error:
            return classify(error)

    def run_cells(self, executor: RunningExecutor, display: Display) -> None:
        """Runs every cell that has no result and may get one; dense cells that teach come before all others."""
        ledger = self.start.ledger
        self._tune_teachers(executor, display)
        if self.stopped:
            return
        jobs = [self._job(cell) for cell in self.plan.cells]
        self._supersede(jobs)
        same_as = self._same_as(jobs)
        ran = {outcome.job.key: outcome.failure is None for outcome in self.outcomes}
        display.finished = sum(ran.get(job.key, job.key in ledger.finished) for job in jobs)
        waiting = []
        for job, same in zip(jobs, same_as, strict=True):
            if same is not None or job.key in ledger.finished or job.key in ran:
                continue
            if (again := self._again(job)) is not None:
                waiting.append(again)
            else:
                self._add_hole(Hole.of_run(ledger.failed[job.key][-1]), display)
        # Those that are tried again only because somebody asks come last: where they fail again, and stop the worker,
        # the others have been run.
        waiting.sort(key=lambda job: ledger.is_asked(job.key))
        display.awaits(job.cell for job in waiting)
        self.run_jobs(executor, waiting)
        self._record_same(jobs, same_as, display)

    def _tune_teachers(self, executor: RunningExecutor, display: Display) -> None:
        """Runs the dense cells whose models teach others, and records their runs."""
        ledger = self.start.ledger
        numbers = sorted({cell.teacher for cell in self.plan.cells if cell.teacher is not None})
        jobs = {number: self._job(self.plan.cells[number]) for number in numbers}
        tried = [self._again(job) for job in jobs.values() if job.key not in ledger.finished]
        waiting = [job for job in tried if job is not None]
        if waiting:
            display.awaits(job.cell for job in waiting)
            self.run_jobs(executor, waiting)
        ended = {outcome.job.key: outcome for outcome in self.outcomes}
        for number, job in jobs.items():
            if job.key in ledger.finished:
                self.teachers[number] = ledger.finished[job.key]
            elif job.key in ended and ended[job.key].failure is None:
                self.teachers[number] = self.tracker.run(ended[job.key].run_id)
            elif job.key in ended:
                self.teachers[number] = _of_teacher(job, ended[job.key].failure)
            elif job.key in ledger.failed:
                hole = Hole.of_run(ledger.failed[job.key][-1])
                self.teachers[number] = _of_teacher(job, Failure(hole.kind, hole.message, ""))

    def run_jobs(self, executor: RunningExecutor, jobs: Iterable[Job]) -> None:
        """Runs jobs, and records how they ended."""
        queue = Queue(jobs, self.max_retries)
        try:
            executor.run(queue)
        finally:
            self.outcomes += queue.outcomes
        self.holes += [Hole.of_outcome(outcome) for outcome in queue.outcomes if outcome.failure is not None]
        self.stopped = queue.stopped

    def _add_hole(self, hole: Hole, display: Display) -> None:
        self.holes.append(hole)
        display.recorded(failed=True)

    def _same_as(self, jobs: list[CellJob]) -> list[int | None]:
        """The plan's twins, and the cells under two names (``auto`` and the device it is) that are one computation."""
        first: dict[str, int] = {}
        return [
            cell.same_as if cell.same_as is not None or first.setdefault(job.key, number) == number else first[job.key]
            for number, (job, cell) in enumerate(zip(jobs, self.plan.cells, strict=True))
        ]

    def _supersede(self, jobs: list[CellJob]) -> None:
        """Marks the runs of earlier starts whose names are those of a cell of this plan, and whose weights, rows or
        program were others: they stay to be read, and are no part of this study's results any more. A run of an older
        version has fewer names."""
        planned = [(_named(flatten_config(job.cell.canonical())), job.key) for job in jobs
                   if not isinstance(job.masks, Failure)]  # fmt: skip
        keys = {key for _, key in planned}
        for run in self.start.ledger.cells:
            if run.cell_key in keys or not (names := _named(run.params)):
                continue
            if wanted := {key for cell, key in planned if names <= cell}:
                self.tracker.log(run.run_id, tags={Tag.SUPERSEDED: ",".join(sorted(wanted))})

    def _again(self, job: CellJob) -> CellJob | None:
        """The job as it is to be run after what earlier starts say of it; None: it is not tried again.

        Each start tries a failed cell again up to ``max_retries`` times: whoever resumes has put something right.
        """
        ledger = self.start.ledger
        failed, asked = ledger.failed.get(job.key), ledger.is_asked(job.key)
        if not failed:
            return job
        if not asked and (ledger.failure_class(job.key) not in RETRIED or self.max_retries < 1):
            return None
        job = replace(job, attempt=len(failed), allowed=len(failed) + max(self.max_retries, int(asked)))
        return job.halved() if ledger.ran_out_of_memory(job.key) else job.again()

    def _found(self, job: MaskJob) -> Masks | None:
        """The mask set of an earlier start: in the study's folder, else among the artifacts of its run."""
        run = self.start.ledger.masks.get(job.key)
        if run is None:
            return None
        files = read_manifest(job.folder)
        if files is None:
            fetched = job.folder.parent / f"{job.name}-run"
            fetched.mkdir(parents=True, exist_ok=True)
            try:
                files = read_manifest(self.tracker.fetch(run.run_id, "masks", fetched))
            except UserError:
                return None
        return _by_level(files) if files else None

    def _job(self, cell: PlannedCell) -> CellJob:
        masks, tuned, weights = self.masks_of(cell), "", ""
        if isinstance(teacher := self.teachers.get(cell.teacher), Failure):
            masks = teacher
        elif teacher is not None:
            tuned, weights = teacher.run_id, teacher.tags[Tag.MERGED_FINGERPRINT]
        key = cell_key(cell.config, cell.identity, masks.checksum if isinstance(masks, MaskFile) else "", weights)
        folder = self.start.folder / "cells" / key
        return CellJob(cell.config, masks, folder, key, name=cell.title, identity=cell.identity, tuned=tuned)

    def _record_same(self, jobs: list[CellJob], same_as: list[int | None], display: Display) -> None:
        """Runs of the cells that compute the same as another, tagged with its run: nothing is measured twice."""
        ledger, ended = self.start.ledger, {outcome.job.key: outcome for outcome in self.outcomes}
        for job, same in zip(jobs, same_as, strict=True):
            if same is None or ledger.has(job.key, flatten_config(job.cell.canonical())):
                continue
            outcome, before = ended.get(jobs[same].key), ledger.finished.get(jobs[same].key)
            if outcome is None and before is None:  # not run now, not finished then
                if job.key in ledger.failed:
                    self._add_hole(Hole.of_run(ledger.failed[job.key][-1]), display)
                continue
            failure = outcome.failure if outcome is not None else None
            tags = {Tag.KIND: job.kind, job.key_tag: job.key, Tag.MASK_CHECKSUM: job.checksum}
            tags |= {Tag.SAME_AS: before.run_id if outcome is None else outcome.run_id}
            if failure is not None:
                tags |= {Tag.FAILURE_CLASS: failure.kind, Tag.FAILURE_MESSAGE: failure.message}
            run_id = self.tracker.start_child(self.start.parent, job.title, tags)
            job.log_inputs(self.tracker, run_id)
            if failure is None:
                self.tracker.copy_inputs(run_id, tags[Tag.SAME_AS])
            self.tracker.finish(run_id, "FINISHED" if failure is None else "FAILED")
            if failure is None:
                display.recorded(failed=False)
            else:
                self._add_hole(Hole(job.title, failure.kind, failure.message, run_id), display)


def holes_table(holes: list[Hole]) -> Table:
    """The cells without a result: what, why, and which run holds the traceback."""
    table = Table("cell", "why", "message", "run", title="holes", title_justify="left", box=SIMPLE_HEAD)
    for hole in holes:
        table.add_row(hole.title, hole.kind, hole.message, hole.run_id[:8])
    return table


def _of_teacher(job: CellJob, failure: Failure) -> Failure:
    return replace(failure, message=f"its teacher, {job.title}, failed: {failure.message}")


def _named(params: Mapping[str, str]) -> frozenset:
    """A cell's configuration as its run holds it."""
    return frozenset(pair for pair in params.items() if pair[0].startswith("cfg/"))


def _by_level(files) -> dict[float, MaskFile]:
    return {file.sparsity: file for file in files}

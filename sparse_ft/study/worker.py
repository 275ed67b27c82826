"""Runs jobs one after another in one process, each as a child run. Every executor calls this."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sparse_ft.cell.early_stopping import StoppedEarly
from sparse_ft.cell.failures import CellTimeoutError, Failure, classify
from sparse_ft.cell.identity import cell_identity, check_identity
from sparse_ft.cell.inputs import cell_inputs, mask_inputs
from sparse_ft.cell.live import live
from sparse_ft.cell.masks import make_masks, write_manifest
from sparse_ft.cell.note import cell_note
from sparse_ft.cell.record import cell_command, device_tags, log_cell_result, log_masks, log_what_can_be
from sparse_ft.cell.trainer import LOCAL
from sparse_ft.cell.training import Trainer, Watch
from sparse_ft.cell.workbench import Workbench
from sparse_ft.memory import release_memory
from sparse_ft.processes import process_name
from sparse_ft.progress import SILENT, Progress
from sparse_ft.study.jobs import CellJob, Job, MaskJob, Outcome
from sparse_ft.tracking.record import Kind, Tag
from sparse_ft.tracking.runs import Tracker
from sparse_ft.tracking.stores import reachable

__all__ = ["Worker", "WorkerSetup", "beyond_work", "close_lost"]

_LONG = 10.0  # seconds from which on a job's use of the machine is logged
_PAUSE = 5.0  # seconds that a store or a network gets to come back before the next try
# Stages of any name that begins so are a cell's work; the rest of its time is overhead.
_WORK = ("time/train_", "time/eval_", "time/recover_", "time/measure_")


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker needs to begin, wherever it runs.

    Attributes:
        tracking_uri: the store.
        parent_run_id: the study's run.
        shared: folder for scores that several cells share.
        trainer: how cells are trained.
        gpus_per_cell: the most processes that run a cell together.
    """

    tracking_uri: str
    parent_run_id: str
    shared: Path
    trainer: Trainer = LOCAL
    gpus_per_cell: int = 1

    def build(self, bench: Workbench | None = None) -> Worker:
        """The worker, in the process that calls, with what cells need imported: that takes seconds, which would be the
        first cell's, and Ctrl-C in the middle of them ends a process by the signal, though it was handled (CPython
        notes one that an ``exec`` has seen).
        """
        import sparse_ft.cell.run  # noqa: F401

        return Worker(self, bench or Workbench(shared=self.shared))


class Worker:
    """Holds what is kept between jobs and logs each as a child of one parent.

    Args:
        setup: where things are.
        bench: what is in memory already, if anything.
    """

    def __init__(self, setup: WorkerSetup, bench: Workbench):
        self._tracker = Tracker(setup.tracking_uri)
        self._parent, self._trainer = setup.parent_run_id, setup.trainer
        self._bench = bench
        bench.store = setup.tracking_uri
        self._name = process_name()
        self._unsent = setup.shared.parent / "unsent"

    def close(self) -> None:
        """Ends the processes that ran cells with this one."""
        self._bench.end()

    def run(
        self, job: Job, progress: Progress = SILENT, opened: Callable[[str], None] = lambda run_id: None
    ) -> Outcome:
        """Runs one job. A failure is logged and returned; Ctrl-C closes the run as KILLED and goes on up.

        Args:
            job: of any kind.
            progress: told its stages.
            opened: told the run's id, at once.
        """
        done = job.run(lambda work: self._run(work, progress, opened))
        if done.failure is not None and done.failure.kind == "infrastructure":
            time.sleep(_PAUSE)
        return done

    def _run(self, job: Job, progress: Progress, opened: Callable[[str], None]) -> Outcome:
        self._bench.progress = progress
        began = time.monotonic()
        if job.attempt > 1:
            release_memory()  # what failed before may hold its tensors still, in the frames of its traceback
        try:
            run_id = self._tracker.start_child(self._parent, job.title, {**job.run_tags, Tag.WORKER: self._name})
        except Exception as error:  # the store is full or gone
            return Outcome(job, "", "FAILED", time.monotonic() - began, failure=classify(error))
        opened(run_id)
        try:
            with self._tracker.system_metrics(run_id, after=_LONG):  # of where the work is done
                done = self._cell(job, run_id, began) if job.is_cell else self._masks(job, run_id, began)
            if done.failure is None:
                self._tracker.finish(run_id)
            return done
        except StoppedEarly as stop:
            return self._stopped(job, run_id, began, stop)
        except (Exception, CellTimeoutError) as error:
            return self._failed(job, run_id, began, classify(error))
        except BaseException:  # Ctrl-C, or the executor's request to stop
            self._tracker.finish(run_id, "KILLED")
            raise
        finally:
            progress.stop()

    def _cell(self, job: CellJob, run_id: str, began: float) -> Outcome:
        from sparse_ft.cell.run import run_cell  # not by the driver, which imports what a worker is begun with

        identity, tags = job.identity, {}
        try:
            if not isinstance(job.masks, Failure):
                tags = device_tags(job.cell.device)
                identity = cell_identity(job.cell, self._bench, self._trainer.name)
        finally:
            job.log_inputs(self._tracker, run_id, identity, tags=tags)
        if isinstance(job.masks, Failure):
            return self._failed(job, run_id, began, job.masks)
        check_identity(job.identity, identity, job.title)
        self._tracker.log_inputs(run_id, cell_inputs(job.cell, identity, self._bench))
        watch = Watch(run_id, job.judge, job.is_reduced)
        with live(self._tracker, run_id, self._bench, self._unsent) as points:
            result = run_cell(
                job.cell, job.masks, self._bench, job.folder, self._trainer, watch, job.title, tuned=job.tuned
            )
        result.series = points.rest(result.series)
        note = cell_note(job.cell, result, cell_command(job.cell, identity, job.tuned, job.mask_levels))
        log_cell_result(self._tracker, run_id, result, note)
        _clear(job.folder, result.merged)
        seconds = time.monotonic() - began
        overhead = {"time/overhead_seconds": beyond_work(seconds, result.metrics)}
        self._tracker.log(run_id, metrics=overhead)
        metrics = result.metrics | overhead
        return Outcome(job, run_id, "FINISHED", time.monotonic() - began, metrics)

    def _masks(self, job: MaskJob, run_id: str, began: float) -> Outcome:
        here = device_tags(job.config.device) if job.config.needs_calibration else {}
        job.log_inputs(self._tracker, run_id, tags=here)
        self._tracker.log_inputs(run_id, mask_inputs(job.config, self._bench))
        with live(self._tracker, run_id, self._bench, self._unsent) as points:
            files = make_masks(job.config, self._bench, job.folder)
        write_manifest(job.folder, files)
        log_masks(self._tracker, run_id, files, points)
        return Outcome(job, run_id, "FINISHED", time.monotonic() - began, masks=tuple(files))

    def _stopped(self, job: CellJob, run_id: str, began: float, stop: StoppedEarly) -> Outcome:
        """A trial that was stopped has no scores and is no cell of any table."""
        tags = {Tag.KIND: Kind.STOPPED_TRIAL, Tag.STOPPED: stop}
        self._tracker.log(run_id, tags=tags)
        self._tracker.finish(run_id)
        job.discard()
        return Outcome(job, run_id, "PRUNED", time.monotonic() - began)

    def _failed(self, job: Job, run_id: str, began: float, failure: Failure) -> Outcome:
        _close(self._tracker, run_id, failure)
        job.discard()
        return Outcome(job, run_id, "FAILED", time.monotonic() - began, failure=failure)


def close_lost(tracker: Tracker, parent: str, job: Job, run_id: str, failure: Failure, seconds: float) -> Outcome:
    """Ends, from the driver, the run of a job whose worker is gone; a run is made where it came to none.

    A worker that was lost after it had ended the run of a cell has done its work: the run stays FINISHED.
    """
    if run_id and job.results_in_run and (found := tracker.run(run_id)).is_finished:
        return Outcome(job, run_id, "FINISHED", seconds, found.metrics)
    if not run_id and job.key_tag:
        run_id = tracker.start_child(parent, job.title, job.run_tags)
        job.log_inputs(tracker, run_id)
    if run_id:
        _close(tracker, run_id, failure)
    job.discard()
    return Outcome(job, run_id, "FAILED", seconds, failure=failure)


def beyond_work(seconds: float, metrics: Mapping[str, float]) -> float:
    """What a cell of so many seconds took beyond training, scoring and measuring, by the times of its stages."""
    return seconds - sum(value for name, value in metrics.items() if name.startswith(_WORK))


def _clear(folder: Path, merged: Path | None) -> None:
    """Removes what the cell wrote and its run now holds; a merged checkpoint that is kept is the only copy."""
    for path in folder.iterdir():
        if path != merged:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if merged is None:
        folder.rmdir()


def _close(tracker: Tracker, run_id: str, failure: Failure) -> None:
    """Ends a failed run, with what can be logged."""
    log_what_can_be(tracker, run_id, failure)
    with suppress(Exception):
        reachable(tracker.uri)
        tracker.finish(run_id, "FAILED")

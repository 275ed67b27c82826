"""Runs cells one after another in one process, each as a child run. Every executor calls this."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import sparse_ft
from sparse_ft.progress import SILENT, Progress
from sparse_ft.pruning.output import MaskFile
from sparse_ft.study.cell import run_cell
from sparse_ft.study.config import CellConfig
from sparse_ft.study.failures import Failure, classify
from sparse_ft.study.recording import log_cell_inputs, log_cell_result, log_failure
from sparse_ft.study.workbench import Workbench
from sparse_ft.tracking.runs import Tracker

__all__ = ["Job", "Outcome", "Worker"]


@dataclass(frozen=True)
class Job:
    """One cell to run, in a folder of its own. ``masks`` is None for a dense cell, and the failure to report
    where its masks could not be made."""

    cell: CellConfig
    masks: MaskFile | Failure | None
    folder: Path

    @property
    def key(self) -> str:
        """Identity of the cell with its masks and the version of this program."""
        checksum = self.masks.checksum if isinstance(self.masks, MaskFile) else ""
        return self.cell.key(checksum, sparse_ft.__version__)


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its run, the status in MLflow's words, and why it failed."""

    job: Job
    run_id: str
    status: str
    seconds: float
    metrics: Mapping[str, float]
    failure: Failure | None = None


class Worker:
    """Holds what is kept between cells and logs each as a child of one parent.

    Args:
        tracking_uri: the store.
        parent_run_id: the study's run.
        bench: what is in memory already, if anything.
    """

    def __init__(self, tracking_uri: str, parent_run_id: str, bench: Workbench | None = None):
        self._tracker = Tracker(tracking_uri)
        self._parent = parent_run_id
        self._bench = bench or Workbench()

    def run(self, job: Job, progress: Progress = SILENT) -> Outcome:
        """Runs one cell. A failure is logged and returned; Ctrl-C closes the run as KILLED and goes on up."""
        self._bench.progress = progress
        began = time.monotonic()
        run_id = self._tracker.start_child(self._parent, job.cell.title, {"kind": "cell", "cell_key": job.key})
        try:
            log_cell_inputs(self._tracker, run_id, job.cell)
            if isinstance(job.masks, Failure):
                return self._failed(job, run_id, began, job.masks)
            result = run_cell(job.cell, job.masks, self._bench, job.folder)
            log_cell_result(self._tracker, run_id, result)
        except Exception as error:
            return self._failed(job, run_id, began, classify(error))
        except BaseException:  # Ctrl-C, or the executor's request to stop
            self._tracker.finish(run_id, "KILLED")
            raise
        self._tracker.finish(run_id, "FINISHED")
        return Outcome(job, run_id, "FINISHED", time.monotonic() - began, result.metrics)

    def _failed(self, job: Job, run_id: str, began: float, failure: Failure) -> Outcome:
        log_failure(self._tracker, run_id, failure)
        self._tracker.finish(run_id, "FAILED")
        return Outcome(job, run_id, "FAILED", time.monotonic() - began, {}, failure)

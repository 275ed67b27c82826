"""Cells one after another, trained on a Cerebras cluster and scored here."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field, replace

from sparse_ft.cell.record import log_cell_result
from sparse_ft.cell.run import Judge
from sparse_ft.cell.workbench import Workbench
from sparse_ft.cerebras.logs import Step
from sparse_ft.cerebras.trainer import CerebrasSettings, run_cerebras_cell
from sparse_ft.study.executors.serial import SerialExecutor
from sparse_ft.study.queue import Job, Outcome
from sparse_ft.study.worker import Worker, WorkerSetup

__all__ = ["CerebrasExecutor", "CerebrasSetup", "settings_of_try"]


@dataclass(frozen=True)
class CerebrasSetup(WorkerSetup):
    """A worker's setup, and where it trains."""

    cerebras: CerebrasSettings = field(default_factory=CerebrasSettings)

    def build(self, bench: Workbench | None = None) -> Worker:
        return CerebrasWorker(self, bench or Workbench(shared=self.shared))


class CerebrasWorker(Worker):
    """Runs cells by `run_cerebras_cell`; the losses go to the run as they come."""

    def __init__(self, setup: CerebrasSetup, bench: Workbench):
        super().__init__(setup, bench)
        self._settings = setup.cerebras

    def _cell(self, job: Job, run_id: str, began: float, judge: Judge | None) -> Outcome:
        assert judge is None, "search refuses this executor"
        if (failed := self._begin(job, run_id, began)) is not None:
            return failed
        labels = (*self._settings.cluster.job_labels, f"mlflow_run={run_id}")

        def follow(step: Step) -> None:
            values = {"cerebras/loss": step.loss, "cerebras/samples_per_second": step.rate}
            live = {name: [(step.number, value)] for name, value in values.items() if value is not None}
            self._tracker.log(run_id, curves=live)

        settings = settings_of_try(self._settings, job)
        result = run_cerebras_cell(job.cell, job.masks, self._bench, job.folder, settings, follow, labels, job.title)
        log_cell_result(self._tracker, run_id, result)
        if result.merged is None:
            shutil.rmtree(job.folder, ignore_errors=True)
        return Outcome(job, run_id, "FINISHED", time.monotonic() - began, result.metrics)


def settings_of_try(settings: CerebrasSettings, job: Job) -> CerebrasSettings:
    """The settings for this try of a cell: one that ran out of memory computes fewer sequences at a time.

    The step has as many as before, so without saying so the second try would be the first.
    """
    if "reduced_batch" not in job.tags:
        return settings
    return replace(settings, cluster=replace(settings.cluster, micro_batch_size=job.cell.batch_size))


class CerebrasExecutor(SerialExecutor):
    """One cell at a time: a training takes the whole cluster that it was given.

    Ctrl-C stops the trainer and cancels its job (`sparse_ft.cerebras.runner`) before the run is closed.
    """

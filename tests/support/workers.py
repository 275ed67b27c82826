"""What listens to an executor or a worker, workers whose device is broken, and some that send their points at once."""

from collections.abc import Callable, Mapping

import mlflow

from sparse_ft.progress import Progress
from sparse_ft.study.queue import Listener, Queue
from sparse_ft.study.worker import WorkerSetup
from sparse_ft.tracking import live


class Watching(Listener):
    """Remembers what it is told; calls ``at_stage`` for every stage."""

    def __init__(self, at_stage=lambda worker, stage: None):
        self.stages, self.outcomes, self.jobs, self._at_stage = [], [], {}, at_stage

    def started(self, worker, job):
        self.jobs[worker] = job

    def stage(self, worker, stage, total, unit):
        self.stages.append(stage)
        self._at_stage(worker, stage)

    def ended(self, worker, outcome, over=True):
        self.outcomes.append((outcome, over))


class BrokenDevice(WorkerSetup):
    """Real workers, whose device fails for good in the first cell that a process runs: every further one would too."""

    def build(self, bench=None):
        worker = super().build(bench)

        def broken(*args, **kwargs):
            raise RuntimeError("CUDA error: device-side assert triggered")

        worker._cell = broken
        return worker


def check_that_three_device_errors_stop_a_worker(study: tuple, executor: Callable) -> None:
    """``executor``: makes one of one worker, from its setup and what listens to it."""
    tracker, parent, setup, jobs = study
    running = executor(BrokenDevice(**vars(setup)), Watching())
    try:
        queue = Queue(jobs(5), max_retries=0)
        running.run(queue)
    finally:
        running.close()
    assert [outcome.failure.kind for outcome in queue.outcomes] == ["worker_lost"] * 3
    assert len({run.tags["worker"] for run in tracker.children(parent)}) == 3  # a new process for each
    assert (queue.left, "3 cells in a row failed alike" in queue.stopped) == (2, True)


class Prompt(WorkerSetup):
    """Real workers that send their points every tenth of a second."""

    def build(self, bench=None):
        live.EVERY_SECONDS = 0.1  # in the worker's own process
        return super().build(bench)


class Measured(WorkerSetup):
    """Real workers that measure their machine ten times a second, as ``system/worker/...``, from a job's beginning."""

    def build(self, bench=None):
        mlflow.set_system_metrics_node_id("worker")  # in the worker's own process
        worker = super().build(bench)
        measured = worker._tracker.system_metrics
        worker._tracker.system_metrics = lambda run_id, after: measured(run_id, seconds=0.1)
        return worker


class AtStep(Progress):
    """Calls ``then`` when a training has come to a step, from within the work; keeps the notes of all its steps."""

    def __init__(self, then: Mapping[int, Callable[[], object]]):
        self._then, self.notes = dict(then), []

    def advance(self, amount=1, note=""):
        if note.startswith("loss "):
            self.notes.append(note)
            self._then.pop(len(self.notes), lambda: None)()

"""Real worker processes, killed by real signals."""

import os
import signal
import time
from dataclasses import replace

import psutil
import pytest
from workers import BrokenDevice, Measured, Prompt, Watching, check_that_three_device_errors_stop_a_worker

from sparse_ft.study.executors.process import ProcessExecutor, _surroundings, default_workers, visible_gpus
from sparse_ft.study.executors.serial import SerialExecutor
from sparse_ft.study.queue import Queue


def _worker_of(tracker, parent, key):
    (run,) = [run for run in tracker.children(parent, "RUNNING") if run.tags["cell_key"] == key]
    return _worker_pid(run)


def _worker_pid(run):
    return int(run.tags["worker"].split(" ")[1])


@pytest.mark.slow
def test_a_killed_worker_costs_its_cell_one_try_and_a_slow_cell_its_worker(study, tmp_path):
    tracker, parent, setup, jobs = study
    fast, slow = jobs(2), replace(jobs(1)[0], cell=replace(jobs(1)[0].cell, max_steps=100_000), key="slow")
    killed = []

    def kill_once(worker, stage):
        if stage == "train" and not killed:
            job = listen.jobs[worker]
            killed.append((job.key, _worker_of(tracker, parent, job.key)))
            os.kill(killed[0][1], signal.SIGKILL)

    listen = Watching(kill_once)
    executor = ProcessExecutor(setup, listen, 1, logs=tmp_path / "logs")
    try:
        queue = Queue(fast)
        executor.run(queue)
        assert {outcome.status for outcome in queue.outcomes} == {"FINISHED"}
        lost = [outcome for outcome, over in listen.outcomes if not over]
        assert [(outcome.job.key, outcome.failure.kind) for outcome in lost] == [(killed[0][0], "worker_lost")]
        assert "signal 9" in lost[0].failure.message
        statuses = sorted((run.status, run.tags["attempt"]) for run in tracker.children(parent))
        assert statuses == [("FAILED", "1"), ("FINISHED", "1"), ("FINISHED", "2")]
        (failed,) = tracker.children(parent, "FAILED")
        assert failed.tags["failure_class"] == "worker_lost"
        assert len({run.tags["worker"] for run in tracker.children(parent)}) == 2  # the killed one and its successor

        executor._limit = 2.0
        queue = Queue([slow], max_retries=0)
        began = time.monotonic()
        executor.run(queue)
        assert time.monotonic() - began < 120
        assert [outcome.failure.kind for outcome in queue.outcomes] == ["timeout"]
        assert tracker.children(parent, "RUNNING") == []
    finally:
        executor.close()
    assert not [
        child for child in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(child.cmdline())
    ]


@pytest.mark.slow
def test_two_workers_share_gpus_threads_and_scores_and_say_how_far_they_are(study, tmp_path):
    tracker, parent, setup, jobs = study
    listen = Watching()
    executor = ProcessExecutor(setup, listen, 2, logs=tmp_path / "logs", gpus=["3", "GPU-7a"])
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        executor.run(Queue(jobs(4, device="cpu")))
        processes = [handle.process for handle in executor._handles]
        seen = [psutil.Process(process.pid).environ() for process in processes]
    finally:
        executor.close()
    assert [process.exitcode for process in processes] == [0, 0]  # by themselves: a killed one leaves semaphores behind
    assert [surroundings["CUDA_VISIBLE_DEVICES"] for surroundings in seen] == ["3", "GPU-7a"]
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert {surroundings["OMP_NUM_THREADS"] for surroundings in seen} == {share}
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before  # the driver's own is as it was
    assert [outcome.status for outcome, _ in listen.outcomes] == ["FINISHED"] * 4
    assert "train" in listen.stages
    assert any(stage.startswith("score") for stage in listen.stages)
    runs = tracker.children(parent)
    # All cells start from the same weights: three take over the score that one of them has measured.
    assert len({run.tags["untuned_measured_by"] for run in runs}) == 1
    assert len(list((tmp_path / "untuned").glob("*.json"))) == 1
    assert all(run.metrics["time/overhead_seconds"] > 0 for run in runs)
    assert not (tmp_path / "cells").exists() or not any((tmp_path / "cells").iterdir())


def test_more_workers_than_gpus_share_them_and_without_any_none_is_named():
    names = [_surroundings(number, 1, ["0", "1"])["CUDA_VISIBLE_DEVICES"] for number in range(4)]
    assert names == ["0", "1", "0", "1"]
    assert "CUDA_VISIBLE_DEVICES" not in _surroundings(0, 1, [])
    groups = [_surroundings(number, 1, ["0", "1", "2", "GPU-3"], each=2)["CUDA_VISIBLE_DEVICES"] for number in range(3)]
    assert groups == ["0,1", "2,GPU-3", "0,1"]


def test_the_gpus_given_out_are_those_that_torch_counts(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-9")
    assert (visible_gpus(), default_workers()) == (["5", "GPU-9"], 2)
    assert (default_workers(2), default_workers(4)) == (1, 1)


@pytest.mark.slow
def test_a_device_error_costs_its_process_and_three_in_a_row_the_worker(study, tmp_path):
    check_that_three_device_errors_stop_a_worker(
        study, lambda setup, listen: ProcessExecutor(setup, listen, 1, logs=tmp_path / "logs")
    )


def test_a_device_error_in_the_drivers_own_process_ends_the_phase(study):
    tracker, parent, setup, jobs = study
    queue = Queue(jobs(3))
    SerialExecutor(BrokenDevice(**vars(setup)), Watching()).run(queue)
    assert [outcome.failure.kind for outcome in queue.outcomes] == []
    assert (queue.left, "this process can use it no more" in queue.stopped) == (3, True)
    assert [run.tags["failure_class"] for run in tracker.children(parent)] == ["worker_lost"]


@pytest.mark.slow
def test_a_workers_curves_are_there_while_its_cell_runs(study, tmp_path):
    tracker, parent, setup, jobs = study

    class Following(Watching):
        seen = 0

        def advanced(self, worker, amount, note):
            if not self.seen and note.startswith("loss"):
                running = tracker.children(parent, "RUNNING")
                self.seen = len(tracker.curve(running[0].run_id, "train/loss_curve")) if running else 0

    listen, steps = Following(), 600  # so many that the driver has read some of them before the last
    executor = ProcessExecutor(Prompt(**vars(setup)), listen, 1, logs=tmp_path / "logs")
    try:
        queue = Queue(jobs(1, max_steps=steps, perplexity_tokens=0, score_untuned=False))
        executor.run(queue)
    finally:
        executor.close()
    (outcome,) = queue.outcomes
    assert outcome.status == "FINISHED" and 0 < listen.seen < steps
    points = tracker.client.get_metric_history(outcome.run_id, "train/loss_curve")
    assert [point.step for point in points] == list(range(1, steps + 1))
    times = [point.timestamp for point in points]
    assert times == sorted(times) and times[-1] - times[0] > 200


def test_system_metrics_are_of_the_process_that_does_the_work(study, tmp_path):
    tracker, parent, setup, jobs = study
    executor = ProcessExecutor(Measured(**vars(setup)), Watching(), 1, logs=tmp_path / "logs")
    try:
        queue = Queue(jobs(1))
        executor.run(queue)
    finally:
        executor.close()
    (cell,) = tracker.children(parent)
    assert cell.status == "FINISHED" and _worker_pid(cell) != os.getpid()
    assert cell.metrics["system/worker/system_memory_usage_megabytes"] > 0

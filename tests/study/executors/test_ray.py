"""A Ray cluster of two nodes on this machine, one of which is killed in the middle."""

import pytest

from sparse_ft.study.config import CellConfig
from sparse_ft.study.jobs import Job, Listener, Queue
from sparse_ft.study.worker import WorkerSetup
from sparse_ft.tracking.runs import Tracker

ray = pytest.importorskip("ray", reason="ray is an optional extra: pip install 'sparse_ft[ray]'")


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
    yield cluster, second
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_a_node_killed_in_the_middle_costs_no_cell(cluster, tmp_path, small):
    from sparse_ft.study.executors.ray import RayExecutor

    cluster, second = cluster
    tracker = Tracker()
    parent = tracker.start("study", {"kind": "study"})
    cells = [
        CellConfig(**{"model": "tiny-llama", "mode": "dense", **small, "seed": n, "max_steps": 8}) for n in range(6)
    ]
    jobs = [Job(cell, None, tmp_path / "cells" / str(cell.seed)) for cell in cells]
    killed = []

    class Killing(Listener):
        def ended(self, worker, outcome, over=True):
            runs = tracker.children(parent, "RUNNING")
            if outcome.status == "FINISHED" and runs and not killed:
                cluster.remove_node(second)  # kills all its processes, the actor's among them
                killed.append([run["tags"]["cell_key"] for run in runs])

    executor = RayExecutor(WorkerSetup(tracker.uri, parent, tmp_path / "untuned"), Killing(), 2)
    try:
        queue = Queue(jobs, max_retries=2)
        executor.run(queue)
    finally:
        executor.close()
    assert killed
    assert [outcome.failure for outcome in queue.outcomes] == [None] * 6
    runs = tracker.children(parent)
    assert {run["status"] for run in runs} <= {"FINISHED", "FAILED"}
    finished = [run["tags"]["cell_key"] for run in runs if run["status"] == "FINISHED"]
    assert sorted(finished) == sorted(job.key for job in jobs)
    assert {run["tags"]["failure_class"] for run in runs if run["status"] == "FAILED"} <= {"worker_lost"}

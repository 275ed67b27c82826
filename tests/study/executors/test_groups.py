"""Cells of two processes each, of which one is killed: the cell is lost, tried again, and finished."""

import threading
import time
from contextlib import suppress

import psutil
import pytest

from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.driver import sweep
from sparse_ft.tracking.runs import Tracker

pytestmark = pytest.mark.slow

FOLLOWERS = {"process": "sparse_ft.cell.group.follow", "ray": "ray::_Follower.follow"}


@pytest.fixture
def study_of_groups(study_file, tmp_path):
    """Runs a study of one cell, whose second process is killed while it trains; returns the runs of the cell."""

    def run(executor, **options):
        path = study_file(
            {"model": ["tiny-llama"], "sparsity": [0.0], "mode": ["dense"]},
            cell={"gpus_per_cell": 2, "max_steps": 60, "score_untuned": False},
        )
        config = SweepConfig(
            config=str(path), output_dir=str(tmp_path / "out"), executor=executor, max_workers=1, **options
        )
        over, killed = threading.Event(), []

        def kill_one():
            while not over.wait(0.05) and not killed:
                if not list((tmp_path / "out").rglob("trainer")):  # made when training begins, gone when it ends
                    continue
                for process in psutil.Process().children(recursive=True):
                    with suppress(psutil.Error):  # others end meanwhile
                        if FOLLOWERS[executor] in " ".join(process.cmdline()):
                            process.kill()
                            killed.append(process.pid)

        thread = threading.Thread(target=kill_one)
        thread.start()
        try:
            assert sweep(config) == 0
        finally:
            over.set()
            thread.join()
        assert killed
        tracker = Tracker()
        (parent,) = [run for run in tracker.search() if run.tags.get("kind") == "study"]
        return sorted(
            (run for run in tracker.children(parent.run_id) if run.tags["kind"] == "cell"),
            key=lambda run: run.tags["attempt"],
        )

    return run


def check(runs):
    lost, again = runs
    assert (lost.status, lost.tags["failure_class"]) == ("FAILED", "worker_lost")
    assert "process 2 of the group's 2 is gone" in lost.tags["failure_message"]
    assert again.is_finished and again.params["cfg/gpus_per_cell"] == "2"
    assert lost.tags["worker"] == again.tags["worker"]  # the one that leads goes on
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        left = [
            p for p in psutil.process_iter(["cmdline"]) if FOLLOWERS["process"] in " ".join(p.info["cmdline"] or [])
        ]
        if not left:
            return
        time.sleep(0.5)
    raise AssertionError(f"still there: {left}")


def test_a_killed_process_of_a_group_costs_one_try(study_of_groups):
    check(study_of_groups("process"))


def test_a_killed_actor_of_a_group_costs_one_try(study_of_groups):
    ray = pytest.importorskip("ray", reason="ray is an optional extra: pip install 'sparse_ft[ray]'")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)  # a process on each
    try:
        check(study_of_groups("ray", ray_address=cluster.address))
    finally:
        ray.shutdown()
        cluster.shutdown()

"""A Ray cluster of two nodes on this machine, one of which is killed in the middle of a study."""

import signal
import sys
import threading
from collections import Counter

import pytest
from workers import check_that_three_device_errors_stop_a_worker

from sparse_ft.errors import UserError
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.driver import sweep
from sparse_ft.tracking.runs import Tracker

ray = pytest.importorskip("ray", reason="ray is an optional extra: pip install 'sparse_ft[ray]'")

from sparse_ft.study.executors.ray import RayExecutor, cores_each  # noqa: E402
from sparse_ft.study.worker import WorkerSetup  # noqa: E402

SMOKE = {"model": ["tiny-llama"], "sparsity": [0.5, 0.7], "mode": ["sparse_to_dense", "sparse_to_sparse"]}
CELLS = 5  # the smoke study's: a dense one, and 2 x 2


@pytest.fixture
def cluster():
    """Two nodes of one core each; the second one can be removed."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    yield cluster, second
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_a_node_killed_in_the_middle_of_the_smoke_study_costs_no_cell(cluster, study_file, tmp_path):
    cluster, second = cluster
    path = study_file(SMOKE, name="smoke", cell={"max_steps": 300})
    config = SweepConfig(
        config=str(path), output_dir=str(tmp_path / "out"), executor="ray", max_workers=2, ray_address=cluster.address
    )
    killed, over = [], threading.Event()

    def kill_the_second_node():
        """As soon as both nodes are at a cell."""
        while not over.wait(0.1):
            if not (tmp_path / "mlflow.db").is_file():
                continue
            running = [run for run in Tracker().search() if run.status == "RUNNING" and run.tags.get("cell_key")]
            if len(running) == 2:
                killed.extend(run.run_id for run in running)
                cluster.remove_node(second, allow_graceful=False)
                return

    thread = threading.Thread(target=kill_the_second_node)
    thread.start()
    try:
        assert sweep(config) == 0
    finally:
        over.set()
        thread.join()
    tracker = Tracker()
    (parent,) = [run for run in tracker.search() if run.tags.get("kind") == "study"]
    runs = [run for run in tracker.children(parent.run_id) if run.tags["kind"] == "cell"]
    finished = Counter(run.tags["cell_key"] for run in runs if run.status == "FINISHED")
    assert (len(finished), set(finished.values())) == (CELLS, {1})
    (lost,) = [run for run in runs if run.status != "FINISHED"]
    assert lost.run_id in killed
    assert (lost.status, lost.tags["failure_class"]) == ("FAILED", "worker_lost")
    (again,) = [run for run in runs if run.tags["attempt"] == "2"]
    assert again.tags["cell_key"] == lost.tags["cell_key"]
    assert again.metrics["sparsity/violations"] == 0
    assert parent.metrics["study/holes"] == 0


@pytest.mark.slow
def test_a_device_error_costs_its_actor_and_three_in_a_row_the_worker(study):
    ray.cloudpickle.register_pickle_by_value(sys.modules["workers"])  # actors cannot import it
    check_that_three_device_errors_stop_a_worker(study, lambda setup, listen: RayExecutor(setup, listen, 1))


def test_an_address_where_no_cluster_answers_is_one_line(tmp_path):
    from sparse_ft.study.executors.ray import RayExecutor
    from sparse_ft.study.queue import Listener

    setup = WorkerSetup(Tracker().uri, "parent", tmp_path)
    with pytest.raises(UserError, match=r"ray_address: no Ray cluster answers at '127\.0\.0\.1:1'") as raised:
        RayExecutor(setup, Listener(), 1, address="127.0.0.1:1")
    assert "\n" not in str(raised.value)
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_dead_cluster_that_the_machine_remembers_is_one_line_or_no_matter(tmp_path, monkeypatch):
    """Killed clusters leave their address behind, and Ray would ask there for many minutes."""
    from sparse_ft.study.executors.ray import RayExecutor
    from sparse_ft.study.queue import Listener

    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    setup = WorkerSetup(Tracker().uri, "parent", tmp_path)
    with pytest.raises(UserError, match="ray_address: no Ray cluster answers at 'auto'"):
        RayExecutor(setup, Listener(), 1, address="auto")
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match="ray_address: no Ray cluster answers at 'auto'"):
        RayExecutor(setup, Listener(), 1, address="auto")
    before = signal.getsignal(signal.SIGTERM)
    executor = RayExecutor(setup, Listener(), 1)  # one of its own
    try:
        assert ray.is_initialized()
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        executor.close()
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("nodes", "workers", "each"),
    [([1, 1], 2, 1), ([4, 4], 1, 4), ([4, 4], 2, 4), ([4, 4], 3, 2), ([3, 3], 3, 1), ([2], 8, 1), ([16, 2], 4, 4)],
)
def test_cores_are_shared_out_within_the_nodes(nodes, workers, each):
    assert cores_each(nodes, workers) == each

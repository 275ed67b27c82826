"""A study that is killed in the middle and started again ends with exactly one FINISHED run for every cell."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.driver import sweep
from sparse_ft.tracking.runs import Tracker

ROOT = Path(__file__).resolve().parents[2]
GRID = {"model": ["tiny-llama"], "sparsity": [0.0, 0.5], "mode": ["sparse_to_dense", "sparse_to_sparse"]}
CELLS = 5  # a dense one, and 2 x 2


@pytest.fixture
def driver(study_file, tmp_path):
    """Starts a study as a process of its own; returns it and the arguments."""
    started = []

    def start(executor="serial", workers=1, cell=None, grid=GRID, output_dir=tmp_path / "out", **rest):
        path = study_file(grid, cell=cell, **rest)
        values = {"config": path, "output_dir": output_dir, "executor": executor, "max_workers": workers}
        argv = [part for key, value in values.items() for part in (f"--{key}", str(value))]
        with open(tmp_path / "driver.log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "entrypoints.sweep", *argv],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Whoever runs the tests in the background ignores Ctrl-C, and children inherit that.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        started.append(process)
        return process, SweepConfig(**{key: str(v) if key != "max_workers" else v for key, v in values.items()})

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for(condition, process, seconds=900, pause=0.2):
    give_up = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the driver ended too early"
        assert time.monotonic() < give_up
        time.sleep(pause)


def _halt_after(finished, process, log):
    """Halts the driver (SIGSTOP) as soon as it says that so many cells are done: what comes next meets the study
    where it is then, on a machine of any speed.
    """
    pattern = re.compile(rf"^\[{finished}/\d+\] FINISHED", re.MULTILINE)
    _wait_for(lambda: pattern.search(log.read_text()), process, pause=0.01)
    process.send_signal(signal.SIGSTOP)


def _study(database):
    """Parent and cells, without creating what is not there yet."""
    if not database.is_file():
        return None, []
    tracker = Tracker()
    parents = [run for run in tracker.search() if run.tags.get("kind") == "study"]
    if not parents:
        return None, []
    return parents[0], [run for run in tracker.children(parents[0].run_id) if run.tags["kind"] == "cell"]


def _complete(parent_run_id, cells=CELLS):
    tracker = Tracker()
    children = tracker.children(parent_run_id)
    runs = [run for run in children if run.tags.get("kind") == "cell"]
    finished = Counter(run.tags["cell_key"] for run in runs if run.status == "FINISHED")
    assert len(finished) == cells
    assert set(finished.values()) == {1}
    assert not [run for run in children if run.status not in ("FINISHED", "KILLED", "FAILED")]
    assert tracker.run(parent_run_id).status == "FINISHED"
    return runs


@pytest.mark.slow
def test_a_driver_killed_in_the_middle_is_resumed(driver, tmp_path, capsys):
    process, config = driver(cell={"max_steps": 6})
    database = tmp_path / "mlflow.db"
    _halt_after(1, process, tmp_path / "driver.log")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    parent, before = _study(database)
    done = [run.run_id for run in before if run.status == "FINISHED"]
    assert parent.status == "RUNNING"  # nobody could say otherwise
    assert len(done) < CELLS
    masks = [path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/masks/*/*.safetensors")]

    assert sweep(config) == 0  # the same configuration in the same experiment finds it
    runs = _complete(parent.run_id)
    assert len({run.run_id for run in runs if run.status == "FINISHED"} & set(done)) == len(done)
    assert masks == [path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/masks/*/*.safetensors")]
    shown = capsys.readouterr()
    assert f"{len(done)} of {CELLS} cells are done" in shown.out
    assert "holes" not in shown.out
    same = [run for run in runs if "same_as" in run.tags and run.status == "FINISHED"]
    assert len(same) == 1  # the two cells at 0 % are one computation
    assert same[0].tags["same_as"] in {run.run_id for run in runs}


@pytest.mark.parametrize(
    ("executor", "sign"),
    [
        ("serial", signal.SIGINT),  # Ctrl-C
        pytest.param("process", signal.SIGTERM, marks=pytest.mark.slow),  # what a batch system sends before it kills
        pytest.param("ray", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_study_cleanly_and_says_how_to_go_on(executor, sign, driver, tmp_path):
    if executor == "ray":
        pytest.importorskip("ray", reason="ray is an optional extra: pip install 'sparse_ft[ray]'")
    process, _ = driver(executor, 1, cell={"max_steps": 5000}, grid={"model": ["tiny-llama"], "mode": ["dense"]})
    _wait_for(lambda: any(run.status == "RUNNING" for run in _study(tmp_path / "mlflow.db")[1]), process)
    process.send_signal(sign)
    assert process.wait(120) == 130
    parent, cells = _study(tmp_path / "mlflow.db")
    assert [parent.status, *(run.status for run in cells)] == ["KILLED", "KILLED"]
    assert f"-P resume={parent.run_id}" in (tmp_path / "driver.log").read_text()


@pytest.mark.slow
def test_a_driver_with_workers_killed_in_the_middle_is_resumed(driver, tmp_path):
    grid = GRID | {"sparsity": [0.0, 0.3, 0.5, 0.7]}
    process, config = driver("process", 2, cell={"max_steps": 6}, grid=grid)
    database = tmp_path / "mlflow.db"
    _halt_after(2, process, tmp_path / "driver.log")
    os.kill(process.pid, signal.SIGKILL)  # its workers must notice for themselves
    process.wait()
    assert sweep(config) == 0
    _complete(_study(database)[0].run_id, 9)


@pytest.mark.slow
def test_one_worker_killed_in_a_study(driver, tmp_path):
    process, _ = driver("process", 2, cell={"max_steps": 200})  # not over before it is killed
    database, killed = tmp_path / "mlflow.db", []

    def kill_one():
        running = [run for run in _study(database)[1] if run.status == "RUNNING"]
        for run in running[:1]:
            killed.append(run.run_id)
            os.kill(int(run.tags["worker"].split(" ")[1]), signal.SIGKILL)
        return bool(killed)

    _wait_for(kill_one, process)
    assert process.wait(900) == 0
    runs = {run.run_id: run for run in _complete(_study(database)[0].run_id)}
    assert runs[killed[0]].status == "FAILED"
    assert runs[killed[0]].tags["failure_class"] == "worker_lost"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few megabytes."""
    if not sys.platform.startswith("linux"):
        pytest.skip("a small file system is mounted as Linux does it; tests/cell/test_failures.py has what is left")
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    mounted = subprocess.run(mount, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    if any(refusal in mounted.stderr for refusal in ("must be superuser", "permission denied")):
        pytest.skip(f"mounts are not allowed here: {mounted.stderr.strip()}")
    assert mounted.returncode == 0, mounted.stderr  # whatever else is wrong is no reason to leave the test out
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk_leaves_named_holes_that_a_resumed_study_fills(small_disk, driver, tmp_path):
    process, config = driver(output_dir=small_disk, keep="none")
    _halt_after(1, process, tmp_path / "driver.log")
    filler = small_disk / "filler"
    with suppress(OSError), open(filler, "wb", buffering=0) as stream:  # until it is full
        while True:
            stream.write(b"x" * 4096)
    process.send_signal(signal.SIGCONT)
    assert process.wait(900) == 1
    parent, cells = _study(tmp_path / "mlflow.db")
    failed = [run for run in cells if run.status == "FAILED"]
    assert failed
    assert {run.tags["failure_class"] for run in failed} == {"disk_full"}
    shown = (tmp_path / "driver.log").read_text()
    assert "holes" in shown
    assert "disk_full" in shown
    filler.unlink()
    assert sweep(config) == 0
    _complete(parent.run_id)

"""Workers as jobs of submitit's own local cluster; and what is asked of SLURM."""

import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import psutil
import pytest
from workers import Watching

from sparse_ft.cli import run
from sparse_ft.errors import UserError
from sparse_ft.study.queue import Queue
from sparse_ft.tracking.runs import Tracker

submitit = pytest.importorskip("submitit", reason="submitit is an optional extra: pip install 'sparse_ft[submitit]'")

from sparse_ft.study.executors import submitit as module  # noqa: E402
from sparse_ft.study.executors.mailbox import Mailbox  # noqa: E402
from sparse_ft.study.executors.submitit import SubmititExecutor, SubmittedHandle, parameters  # noqa: E402

LOCAL = {"cluster": "local"}


def _jobs_of_submitit():
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # that of a lost worker ends in this moment
            found += [process] if "submitit" in " ".join(process.cmdline()) else []
    return found


def _gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=30)
    return not alive


def _kill_once(study, sign):
    """Listens, and sends the first worker that trains a signal."""
    tracker, parent, *_ = study
    killed = []

    def kill(worker, stage):
        if stage == "train" and not killed:
            (found,) = tracker.children(parent, "RUNNING")  # it trains long enough for its message to be read
            killed.append(found.run_id)
            os.kill(int(found.tags["worker"].split(" ")[1]), sign)

    return Watching(kill), killed


@pytest.mark.slow
def test_a_preempted_worker_costs_its_cell_one_try(study, tmp_path):
    tracker, parent, setup, jobs = study
    listen, killed = _kill_once(study, signal.SIGTERM)
    executor = SubmititExecutor(setup, listen, 1, logs=tmp_path / "logs", slurm=LOCAL)
    try:
        queue = Queue(jobs(2, max_steps=600))
        executor.run(queue)
        processes = _jobs_of_submitit()
    finally:
        executor.close()
    assert [outcome.status for outcome in queue.outcomes] == ["FINISHED"] * 2
    (lost,) = [outcome for outcome, over in listen.outcomes if not over]
    assert (lost.run_id, lost.failure.kind) == (killed[0], "worker_lost")
    assert "SIGTERM, from the cluster" in lost.failure.message and "_0_log.out" in lost.failure.message
    statuses = sorted((run.status, run.tags["attempt"]) for run in tracker.children(parent))
    assert statuses == [("FAILED", "1"), ("FINISHED", "1"), ("FINISHED", "2")]
    assert {"train"} < set(listen.stages)
    assert processes and _gone(processes) and len(list((tmp_path / "logs" / "submitit").glob("*_log.out"))) == 2


@pytest.mark.slow
def test_a_killed_worker_costs_its_cell_one_try_and_a_slow_cell_its_worker(study, tmp_path):
    tracker, parent, setup, jobs = study
    listen, _ = _kill_once(study, signal.SIGKILL)
    executor = SubmititExecutor(setup, listen, 1, logs=tmp_path / "logs", slurm=LOCAL)
    try:
        queue = Queue(jobs(1, max_steps=600))
        executor.run(queue)
        (lost,) = [outcome for outcome, over in listen.outcomes if not over]
        assert (lost.failure.kind, "its state is" in lost.failure.message) == ("worker_lost", True)
        assert [outcome.status for outcome in queue.outcomes] == ["FINISHED"]
        executor._limit = 2.0
        queue = Queue(jobs(1, max_steps=100_000), max_retries=0)
        executor.run(queue)
        processes = _jobs_of_submitit()
    finally:
        executor.close()
    assert [outcome.failure.kind for outcome in queue.outcomes] == ["timeout"]
    assert tracker.children(parent, "RUNNING") == [] and _gone(processes)


@pytest.fixture
def worker(study, tmp_path):
    """Starts a worker's function in a process of its own, as a job does; with its mailboxes."""
    started = []

    def start(quick=""):
        jobs, messages = (Mailbox(tmp_path / "worker" / name).create() for name in ("jobs", "messages"))
        life = tmp_path / "life"
        life.write_text("1")
        code = (
            "import sys, pickle; from pathlib import Path; from sparse_ft.study.executors import submitit as m\n"
            f"{quick}\nm.serve(pickle.loads(bytes.fromhex(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]))"
        )
        words = [sys.executable, "-c", code, pickle.dumps(study[2]).hex(), tmp_path / "worker", life]
        started.append(subprocess.Popen(words))
        return started[-1], jobs, messages

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_worker_ends_when_its_driver_is_gone_and_does_not_begin_twice(worker):
    process, _, messages = worker("m._BEAT, m._SILENT = 0.2, 1.0")
    assert process.wait(60) == 1
    said = list(messages.take())
    assert said[0] == ("alive",) and said[-1] == ("gone", "its driver shows no sign of life")
    again, _, messages = worker()  # the cluster starts it again, with the same folder
    assert again.wait(60) == 0
    assert [kind for kind, *_ in messages.take()] == [kind for kind, *_ in said]


def test_what_is_asked_of_slurm_has_submitits_names_and_is_never_started_again_by_itself():
    asked = {"partition": "gpu", "time": 60, "gpus_per_node": 1, "additional_parameters": {"reservation": "r"}}
    cluster, named = parameters(asked)
    assert cluster == "slurm" and named == {
        "slurm_partition": "gpu",
        "timeout_min": 60,
        "gpus_per_node": 1,
        "stderr_to_stdout": True,
        "slurm_additional_parameters": {"no-requeue": True, "reservation": "r"},
    }
    assert parameters({})[1]["timeout_min"] == 1440 and asked["time"] == 60


@pytest.mark.parametrize(
    ("slurm", "said"),
    [
        ({"partitio": "gpu"}, "there is no parameter 'partitio'; there are account, "),
        ({"nodes": 2}, "there is no parameter 'nodes'"),
        ({"time": "1-00:00:00"}, "time is '1-00:00:00'; it must be a whole number of minutes"),
        ({"time": 0}, "time is '0'"),
        ({"cluster": "k8s"}, "cluster is 'k8s'; it must be slurm | local"),
    ],
)
def test_an_unknown_parameter_is_one_line(slurm, said):
    with pytest.raises(UserError, match=said.replace("|", r"\|")):
        parameters(slurm)


def _sweep(study_file, slurm, *words):
    path = study_file({"model": ["tiny-llama"], "mode": ["dense"]})
    return run("sweep", [f"--config={path}", "--executor=submitit", f"--slurm={slurm}", *words], "test")


def test_a_study_that_cannot_be_submitted_is_refused_before_it_has_a_run(study_file, tmp_path, capsys, monkeypatch):
    assert _sweep(study_file, "gpu") == 2
    assert "slurm is 'gpu'; it must be a table such as" in capsys.readouterr().err
    assert _sweep(study_file, "{partitio: gpu}") == 2
    assert "there is no parameter 'partitio'" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _sweep(study_file, "none", "--dry-run") == 1
    assert "problem: executor submitit: there is no SLURM here" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert _sweep(study_file, "none") == 2
    assert "submitit is not installed; pip install 'sparse_ft[submitit]'" in capsys.readouterr().err
    assert not Tracker().search()


BATCH = """#!/bin/sh
echo "$(basename "$0") $*" >> {log}
case "$0" in *sbatch) cp "$1" {script}; echo "Submitted batch job 4711";; *sacct) exit {status};; esac
"""


@pytest.mark.parametrize("accounts", [True, False])
def test_the_workers_are_one_array_and_ctrl_c_takes_it_from_the_queue(study, tmp_path, monkeypatch, accounts):
    """With programs of SLURM's names, which answer as a cluster does whose queue is long."""
    log, script = tmp_path / "log", tmp_path / "script"
    for name in ("sbatch", "srun", "scancel", "sacct"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(BATCH.format(log=log, script=script, status=int(not accounts)))
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    _, _, setup, jobs = study

    class Pressed(Watching):
        def started(self, worker, job):
            if worker == 1:
                raise KeyboardInterrupt

    asked = {"partition": "gpu", "account": "mine", "time": 60, "gpus_per_node": 1}
    executor = SubmititExecutor(setup, Pressed(), 5, logs=tmp_path / "logs", slurm=asked)
    with pytest.raises(KeyboardInterrupt):
        executor.run(Queue(jobs(3)))
    executor.close()
    asked, *lines = log.read_text().splitlines()
    assert asked == "sacct --noheader -j 1"
    if accounts:  # else nobody is asked again, for there is no answer
        lines = [line for line in lines if not line.startswith("sacct")]
    assert lines[0].startswith("sbatch ") and sorted(lines[1:]) == [f"scancel 4711_{number}" for number in range(3)]
    said = script.read_text()
    for line in ("array=0-2%3", "partition=gpu", "account=mine", "time=60", "gpus-per-node=1", "no-requeue"):
        assert f"#SBATCH --{line}\n" in said
    assert not list((tmp_path / "logs" / "submitit").glob("driver-*"))  # so that one which starts all the same ends


def test_a_replacement_leaves_the_messages_of_those_at_work_alone(study, tmp_path, monkeypatch):
    _, _, setup, jobs = study
    executor = SubmititExecutor(setup, Watching(), 4, logs=tmp_path / "logs", slurm=LOCAL)
    asked = []
    monkeypatch.setattr(executor, "_submit", lambda count: asked.append(count) or executor._submitted.extend("ab"))
    for name in ("jobs", "messages"):
        Mailbox(tmp_path / "busy" / name).create()
    paths = SimpleNamespace(result_pickle=tmp_path / "none", stdout=tmp_path / "none")
    busy = SubmittedHandle(SimpleNamespace(job_id="1", paths=paths), tmp_path / "busy", accounts=False)
    executor._queue = Queue(jobs(3))
    busy.assign(executor._queue.take(0))
    executor._handles[0] = busy
    Mailbox(tmp_path / "busy" / "messages").put([("opened", "run")])
    assert (executor._start(1), executor._start(2), asked) == ("a", "b", [2])  # for three jobs, of which one is at work
    assert list(busy.messages()) == [("opened", "run")]


@pytest.mark.slow
def test_a_worker_out_of_work_gives_its_place_back(study, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_IDLE", 0.1)
    executor = SubmititExecutor(study[2], Watching(), 1, logs=tmp_path / "logs", slurm=LOCAL)
    executor._submit(1)
    (handle,) = executor._submitted
    try:
        time.sleep(0.2)
        executor._wait({})
        assert executor._submitted == [] and executor._handles == [None]
        assert handle._submitted.result() is None  # by itself
        assert not handle.is_alive()
    finally:
        executor.close()

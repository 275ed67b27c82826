"""Runs in a real sqlite store, and on a real server."""

from __future__ import annotations

import enum
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sparse_ft.errors import UserError
from sparse_ft.tracking.record import Kind, Tag
from sparse_ft.tracking.runs import Tracker


@pytest.fixture(autouse=True)
def no_inherited_run(monkeypatch: pytest.MonkeyPatch):
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def tracker(uri: str) -> Tracker:
    return Tracker(uri, "study")


# -- stores and experiments


@pytest.mark.slow
def test_a_new_store_is_made_silently_with_artifacts_beside_it(tmp_path: Path):
    code = (
        "from sparse_ft.tracking.runs import Tracker; from mlflow.telemetry import get_telemetry_client;"
        "import logging; assert get_telemetry_client() is None;"
        "t = Tracker('sqlite:///new/mlflow.db', 'study'); r = t.start('one'); t.log_text(r, 'x', 'x.txt')"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_") and key != "CI"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    there = Tracker(f"sqlite:///{tmp_path}/new/mlflow.db", "study")
    (run,) = there.search()
    assert run.artifact_uri.startswith((tmp_path / "new" / "mlruns" / "study").as_uri())
    assert there.fetch_text(run.run_id, "x.txt") == "x"


def test_the_environment_chooses_store_and_experiment(uri: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    tracker = Tracker()
    assert tracker.uri == uri and tracker.experiment("mine") == tracker.experiment_id
    assert Tracker(experiment="other").experiment_id != tracker.experiment_id


def test_relative_sqlite_path_is_the_same_store_from_everywhere(uri: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = Tracker("sqlite:///mlflow.db")
    monkeypatch.chdir("/")
    assert tracker.uri == uri and Tracker(tracker.uri).search() == []


@pytest.mark.parametrize("bad", ["mlruns", "file:///tmp/mlruns"])
def test_folder_stores_are_refused(bad: str):
    with pytest.raises(UserError, match="sqlite"):
        Tracker(bad)


def test_a_server_that_is_not_there_is_one_line_at_once():
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9.*does not answer"):
        Tracker("http://127.0.0.1:9")


def test_a_damaged_store_is_one_line(tmp_path: Path):
    (tmp_path / "mlflow.db").write_bytes(b"this is no database at all" * 100)
    with pytest.raises(UserError, match=r"mlflow\.db"):
        Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_a_deleted_experiment_is_not_written_to(tracker: Tracker):
    tracker.client.delete_experiment(tracker.experiment_id)
    with pytest.raises(UserError, match="restore"):
        Tracker(tracker.uri, "study")


def test_unknown_experiment_lists_the_known(tracker: Tracker):
    with pytest.raises(UserError, match=r"absent.*study"):
        tracker.experiment("absent")


# -- parent and children


def test_children_stand_under_their_parent(tracker: Tracker):
    parent = tracker.start("sweep", {"kind": "study"})
    ids = [tracker.start_child(parent, f"cell {index}", {"index": index, "empty": None}) for index in range(3)]
    other = tracker.start("another sweep")
    tracker.start_child(other, "stranger")
    children = tracker.children(parent)
    assert [child.run_id for child in children] == ids
    assert [child.name for child in children] == ["cell 0", "cell 1", "cell 2"]
    assert children[1].tags["index"] == "1" and "empty" not in children[1].tags
    assert children[0].parent_run_id == parent == children[0].tags["mlflow.parentRunId"]
    assert tracker.run(parent).parent_run_id is None


def test_a_workers_child_is_in_the_parents_experiment(tracker: Tracker):
    parent = tracker.start("sweep")
    worker = Tracker(tracker.uri, "somewhere else")
    child = worker.start_child(parent, "cell")
    assert tracker.run(child).experiment_id == tracker.experiment_id != worker.experiment_id
    assert [run.run_id for run in worker.children(parent)] == [child]


def test_statuses_and_those_left_running(tracker: Tracker):
    parent = tracker.start("sweep")
    runs = {status: tracker.start_child(parent, status) for status in ("FINISHED", "FAILED", "KILLED", "RUNNING")}
    for status, run_id in runs.items():
        if status != "RUNNING":
            tracker.finish(run_id, status)
    assert {run.name: run.status for run in tracker.children(parent)} == {name: name for name in runs}
    (left,) = tracker.children(parent, status="RUNNING")
    assert left.run_id == runs["RUNNING"] and left.end_time is None
    tracker.finish(left.run_id, "KILLED")
    assert tracker.children(parent, status="RUNNING") == []
    assert tracker.run(left.run_id).end_time >= left.start_time
    with pytest.raises(ValueError, match="DONE"):
        tracker.finish(parent, "DONE")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (RuntimeError("x"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(2), "FAILED"),
        (SystemExit(0), "FINISHED"),
    ],
)
def test_a_run_ends_as_its_block_ends(error: BaseException | None, status: str, tracker: Tracker):
    run_id = tracker.start("one")

    def work():
        with tracker.ending(run_id):
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            work()
    else:
        work()
    assert tracker.run(run_id).status == status


def test_reopening_a_parent(tracker: Tracker):
    parent = tracker.start("sweep")
    tracker.finish(parent, "KILLED")
    tracker.reopen(parent)
    assert tracker.run(parent).status == "RUNNING" and tracker.run(parent).end_time is None
    with pytest.raises(UserError, match="0123"):
        tracker.reopen("0123")


# -- the run that `mlflow run` made


def test_the_run_of_mlflow_run_is_adopted(tracker: Tracker, monkeypatch: pytest.MonkeyPatch):
    made = tracker.start("made by mlflow run")
    tracker.log(made, params={"sparsity": ".50", "model": "tiny-llama"})
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    entry_point = Tracker(tracker.uri)
    assert entry_point.experiment_id == tracker.experiment_id
    assert entry_point.start("train", {"kind": "train"}) == made
    # ".50" and "0.5" under one key would be refused by the store, and the run would fail
    entry_point.log(made, params={"sparsity": 0.5, "model": "x", "cfg/sparsity": 0.5})
    run = tracker.run(made)
    assert run.params == {"sparsity": ".50", "model": "tiny-llama", "cfg/sparsity": "0.5"}
    assert run.name == "train" and run.tags["kind"] == "train"
    assert len(tracker.search()) == 1


def test_a_run_to_adopt_that_is_elsewhere(uri: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        Tracker(uri)


def test_a_run_that_somebody_has_around_our_code_is_his_and_ours(tracker: Tracker, monkeypatch: pytest.MonkeyPatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
    with mlflow.start_run(experiment_id=tracker.experiment_id, run_name="mine") as mine:
        ours = Tracker()
        assert ours.start("masks", {"kind": "masks"}) == mine.info.run_id
        ours.finish(mine.info.run_id)
        mlflow.log_metric("score", 1.0)
    run = tracker.run(mine.info.run_id)
    assert (run.name, run.tags["kind"], run.metrics, run.status) == ("mine", "masks", {"score": 1.0}, "FINISHED")
    assert Tracker(tracker.uri, "study").start("another") != mine.info.run_id


def test_a_run_around_our_code_that_is_of_another_store(tracker: Tracker, tmp_path: Path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
    other = Tracker(f"sqlite:///{tmp_path / 'other.db'}", "study")
    with (
        mlflow.start_run(experiment_id=tracker.experiment_id) as mine,
        pytest.raises(UserError, match=rf"the run {mine.info.run_id} of mlflow.start_run\(\) is not in sqlite"),
    ):
        other.start("masks")


# -- logging


class Mode(enum.Enum):
    DENSE = "dense"


def test_one_call_logs_everything(tracker: Tracker, monkeypatch: pytest.MonkeyPatch):
    run_id = tracker.start("cell")
    calls = []
    log_batch = tracker.client.log_batch
    monkeypatch.setattr(tracker.client, "log_batch", lambda *a, **k: (calls.append(k), log_batch(*a, **k)))
    tracker.log(
        run_id,
        params={"cfg/r": 16, "cfg/mode": Mode.DENSE, "cfg/data_dir": None},
        metrics={"eval/accuracy": 0.5, "eval/loss": None, "train/loss": math.nan, "eval/perplexity": math.inf},
        tags={Tag.KIND: Kind.CELL, "same_as": None},
        curves={"loss_curve": [(0, 3.0), (10, 2.0), (20, 1.5), (30, math.nan), (40, -math.inf)]},
    )
    (call,) = calls
    assert {type(text) for tag in call["tags"] for text in (tag.key, tag.value)} == {str}  # of no class of ours
    run = tracker.run(run_id)
    assert run.tags["kind"] == "cell"
    assert run.params == {"cfg/r": "16", "cfg/mode": "dense", "cfg/data_dir": "none"}
    assert run.metrics == {"eval/accuracy": 0.5, "loss_curve": 1.5} and "same_as" not in run.tags
    assert tracker.curve(run_id, "loss_curve") == [(0, 3.0), (10, 2.0), (20, 1.5)]
    tracker.log(run_id)
    assert len(calls) == 1


def test_more_than_a_batch_holds(tracker: Tracker):
    run_id = tracker.start("large")
    curve = [(step, step / 2) for step in range(2300)]
    tracker.log(
        run_id,
        params={f"p{index}": index for index in range(250)},
        tags={f"t{index}": index for index in range(120)},
        metrics={f"m{index}": index for index in range(30)},
        curves={"loss": curve},
    )
    run = tracker.run(run_id)
    assert len(run.params) == 250 and len(run.metrics) == 31
    assert all(run.tags[f"t{index}"] == str(index) for index in range(120))
    assert tracker.curve(run_id, "loss") == curve


def test_a_note_is_written_anew_but_not_over_somebody_elses(tracker: Tracker):
    run_id = tracker.start("study")
    for text in ("x" * 9000, "**50 %** is enough."):
        tracker.note(run_id, text)
    assert tracker.run(run_id).tags[Tag.NOTE].startswith("**50 %** is enough.\n\n*Written by sparse_ft")
    tracker.log(run_id, tags={Tag.NOTE: "mine"})
    tracker.note(run_id, "other")
    assert tracker.run(run_id).tags[Tag.NOTE] == "mine"
    experiment = tracker.client.get_experiment(tracker.experiment_id)
    assert "tags.kind = 'cell'" in experiment.tags[Tag.NOTE]
    tracker.client.set_experiment_tag(tracker.experiment_id, Tag.NOTE.value, "ours")
    tracker.start("another")
    assert tracker.client.get_experiment(tracker.experiment_id).tags[Tag.NOTE] == "ours"


def test_long_values_are_cut_and_do_not_fail(tracker: Tracker):
    run_id = tracker.start("long")
    tracker.log(run_id, params={"long": "x" * 7000}, tags={"long": "y" * 9000})
    run = tracker.run(run_id)
    assert run.params["long"] == "x" * 5997 + "..." and run.tags["long"].endswith("y...")


def test_artifacts_of_every_kind(tracker: Tracker, tmp_path: Path):
    run_id = tracker.start("artifacts")
    (tmp_path / "figures" / "deep").mkdir(parents=True)
    (tmp_path / "figures" / "a.png").write_bytes(b"png")
    (tmp_path / "figures" / "deep" / "b.png").write_bytes(b"png")
    config = {"sparsities": [0.5, 0.7], "name": "Größe", "none": None}
    tracker.log_file(run_id, tmp_path / "figures" / "a.png")
    tracker.log_folder(run_id, tmp_path / "figures", "all")
    tracker.log_dict(run_id, config, "config.yaml")
    tracker.log_dict(run_id, config, "plain/config.json")
    tracker.log_text(run_id, "Traceback", "traceback.txt")
    assert tracker.artifacts(run_id) == [
        "a.png",
        "all/a.png",
        "all/deep/b.png",
        "config.yaml",
        "plain/config.json",
        "traceback.txt",
    ]
    assert yaml.safe_load(tracker.fetch_text(run_id, "config.yaml")) == config
    assert json.loads(tracker.fetch(run_id, "plain/config.json").read_text()) == config
    fetched = tracker.fetch(run_id, "all", tmp_path / "fetched")
    assert (fetched / "deep" / "b.png").read_bytes() == b"png"
    with pytest.raises(UserError, match="absent"):
        tracker.fetch(run_id, "absent.txt")


def test_searching(tracker: Tracker):
    for accuracy in (0.4, 0.6):
        run_id = tracker.start(f"run {accuracy}")
        tracker.log(run_id, metrics={"eval/accuracy": accuracy}, tags={"kind": "cell"})
    tracker.start("no cell")
    assert [run.name for run in tracker.search()] == ["run 0.4", "run 0.6", "no cell"]
    assert [run.name for run in tracker.search("metrics.`eval/accuracy` > 0.5 and tags.kind = 'cell'")] == ["run 0.6"]
    with pytest.raises(UserError, match="nonsense"):
        tracker.search("nonsense ? query")


WORKER = """
import sys
from sparse_ft.tracking.runs import Tracker
uri, parent, worker = sys.argv[1:]
tracker = Tracker(uri)
for cell in range(15):
    run = tracker.start_child(parent, f"{worker}-{cell}", {"kind": "cell"})
    tracker.log(
        run,
        params={f"cfg/p{i}": i for i in range(40)},
        metrics={f"m{i}": cell for i in range(20)},
        curves={"loss": [(step, step) for step in range(50)]},
    )
    tracker.log_dict(run, {"cell": cell}, "config.yaml")
    tracker.finish(run)
"""


@pytest.mark.slow
def test_four_processes_write_to_one_sqlite_store_that_none_of_them_finds_there(tmp_path: Path):
    """They create it, too: the first thing workers of a careless driver would do at once."""
    uri = f"sqlite:///{tmp_path / 'new.db'}"
    creators = [
        subprocess.Popen([sys.executable, "-c", f"from sparse_ft.tracking.runs import Tracker; Tracker({uri!r}, 's')"])
        for _ in range(3)
    ]
    assert [process.wait() for process in creators] == [0, 0, 0]
    tracker = Tracker(uri, "s")
    parent = tracker.start("sweep")
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, uri, parent, str(worker)], stderr=subprocess.PIPE, text=True)
        for worker in range(4)
    ]
    errors = [process.communicate()[1] for process in workers]
    assert [process.returncode for process in workers] == [0] * 4, errors
    children = tracker.children(parent)
    assert sorted(run.name for run in children) == sorted(f"{w}-{c}" for w in range(4) for c in range(15))
    for run in children:
        assert run.status == "FINISHED" and len(run.params) == 40 and len(run.metrics) == 21
    assert len(tracker.curve(children[-1].run_id, "loss")) == 50


@pytest.mark.slow
def test_a_server_keeps_runs_and_artifacts(server: str, tmp_path: Path, capfd: pytest.CaptureFixture):
    tracker = Tracker(server, "study")
    parent = tracker.start("sweep")
    child = tracker.start_child(parent, "cell")
    tracker.log(child, params={"cfg/r": 16}, metrics={"a": 1.0}, curves={"loss": [(0, 1.0), (1, 0.5)]})
    tracker.log_dict(child, {"a": 1}, "config.yaml")
    tracker.finish(child)
    (run,) = tracker.children(parent)
    assert run.status == "FINISHED" and run.metrics == {"a": 1.0, "loss": 0.5}
    assert run.artifact_uri.startswith("mlflow-artifacts:")
    assert tracker.fetch_text(child, "config.yaml") == "a: 1\n"
    assert tracker.artifacts(child) == ["config.yaml"]
    captured = capfd.readouterr()
    assert captured.out == "" and "View run" not in captured.err

"""Points that are sent from a thread: none is lost, none is there twice."""

import json
import shutil
import time
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from servers import mlflow_server

from sparse_ft.cell.failures import classify
from sparse_ft.tracking import live
from sparse_ft.tracking.live import LivePoints, UnsentError
from sparse_ft.tracking.runs import Tracker


@pytest.fixture
def tracker(made_store: Path) -> Tracker:
    return Tracker(f"sqlite:///{made_store}", "study")


@pytest.fixture(scope="module")
def dead(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> tuple[Tracker, str]:
    """The tracker of a server that is gone, and a run of its store."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copyfile(empty_store, folder / "mlflow.db")
    with mlflow_server(folder, f"sqlite:///{folder}/mlflow.db") as address:
        tracker = Tracker(address, "study")
        return tracker, tracker.start("run")


@pytest.fixture
def prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"EVERY_SECONDS": 0.05, "PATIENCE_SECONDS": 1, "_AGAIN_SECONDS": 0.1}.items():
        monkeypatch.setattr(live, name, seconds)


def test_points_keep_their_times_and_are_sent_once_however_many_they_are(tracker: Tracker, tmp_path: Path):
    run_id = tracker.start("run")
    began = time.time()
    with LivePoints(tracker, run_id, tmp_path / "unsent") as points:
        for step in range(1, 2502):
            points.add(step, {"loss": 1 / step, "rate": float("nan")})
        points.add(2501, {"loss": 7.0})  # again: it is left out
        middle = time.time()
        time.sleep(0.05)
        points.add(2502, {"loss": 0.0})
    assert tracker.curve(run_id, "loss") == [(step, 1 / step) for step in range(1, 2502)] + [(2502, 0.0)]
    times = [point.timestamp / 1000 for point in tracker.client.get_metric_history(run_id, "loss")]
    assert times == sorted(times) and began - 0.001 <= times[0] < times[2500] <= middle < times[2501]
    assert tracker.curve(run_id, "rate") == [] and not (tmp_path / "unsent").exists()
    curves = {"loss": [(2502, 0.0), (2503, 0.5)], "rate": [(1, float("nan"))], "kl": [(1, 0.25)]}
    assert points.rest(curves) == {"loss": [(2503, 0.5)], "kl": [(1, 0.25)]}


def test_a_block_that_measures_nothing_starts_no_thread(tracker: Tracker, tmp_path: Path):
    with LivePoints(tracker, tracker.start("run"), tmp_path / "unsent") as points:
        assert points._thread is None


@pytest.mark.usefixtures("prompt")
def test_a_request_whose_answer_is_lost_leaves_no_point_twice(tracker: Tracker, tmp_path: Path, monkeypatch):
    run_id, lost = tracker.start("run"), []
    log_batch = tracker.client.log_batch

    def cut_off(*args, **kwargs):
        log_batch(*args, **kwargs)
        if len(lost) < 2:
            lost.append(True)
            raise ConnectionResetError("the answer is lost")

    monkeypatch.setattr(tracker.client, "log_batch", cut_off)
    with LivePoints(tracker, run_id, tmp_path / "unsent") as points:
        for step in range(5):
            points.add(step, {"loss": 0.5})
    assert len(lost) == 2 and tracker.curve(run_id, "loss") == [(step, 0.5) for step in range(5)]


@pytest.mark.usefixtures("prompt")
def test_what_the_store_refuses_ends_the_work_soon_and_is_its_own_error(tracker: Tracker, tmp_path: Path):
    began = time.monotonic()
    with (
        pytest.raises(MlflowException, match="Invalid value"),
        LivePoints(tracker, tracker.start("run"), tmp_path / "unsent") as points,
    ):
        for step in range(1000):
            points.add(step, {"loss?": 0.5})
            time.sleep(0.01)
    assert time.monotonic() - began < 5
    with (
        pytest.raises(MlflowException, match="Invalid value"),
        LivePoints(tracker, tracker.start("run"), tmp_path / "unsent") as points,
    ):
        points.add(1, {"loss?": 0.5})  # said at the end, where no further point comes


@pytest.mark.slow
@pytest.mark.usefixtures("prompt")
def test_a_server_that_stays_away_leaves_a_file_and_a_line(dead, tmp_path: Path, capsys):
    tracker, run_id = dead
    file = tmp_path / "new" / "unsent.jsonl"
    before = time.time()
    with pytest.raises(UnsentError) as raised, LivePoints(tracker, run_id, file) as points:
        points.add(1, {"loss": 0.5, "rate": 2.0})
        time.sleep(0.2)  # some tries
        points.add(2, {"loss": 0.25})
    assert time.time() - before < 10
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(entry["metric"], entry["step"], entry["value"]) for entry in entries] == [
        ("loss", 1, 0.5), ("rate", 1, 2.0), ("loss", 2, 0.25)
    ]  # fmt: skip
    assert {entry["run_id"] for entry in entries} == {run_id}
    assert before - 0.001 <= entries[0]["timestamp"] / 1000 <= entries[2]["timestamp"] / 1000 - 0.19
    said = str(raised.value)
    assert f"points of the run {run_id} could not be sent (3) and are in {file}: " in said
    assert tracker.uri in said and "does not answer" in said and "start it" in said
    assert classify(raised.value).kind == "infrastructure"

    with pytest.raises(ZeroDivisionError), LivePoints(tracker, run_id, file) as points:
        points.add(1, {"loss": 0.5})
        raise ZeroDivisionError
    assert f"points of the run {run_id} could not be sent (1)" in capsys.readouterr().err


def test_ctrl_c_waits_for_no_server(dead, tmp_path: Path, capsys):
    tracker, run_id = dead
    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt), LivePoints(tracker, run_id, tmp_path / "unsent") as points:
        points.add(1, {"loss": 0.5})
        raise KeyboardInterrupt
    assert time.monotonic() - before < 6
    assert f"points of the run {run_id} could not be sent (1)" in capsys.readouterr().err

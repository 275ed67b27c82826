"""Curves that reach their run while the work goes on, by real trainings and prunings."""

import json
import shutil
import time
from contextlib import ExitStack

import pytest
from servers import mlflow_server
from workers import AtStep, Prompt

from sparse_ft.analysis.table import cell_table
from sparse_ft.cell.live import live
from sparse_ft.cell.masks import make_masks
from sparse_ft.cell.record import log_masks
from sparse_ft.cell.workbench import Workbench
from sparse_ft.commands.train import train
from sparse_ft.progress import Progress
from sparse_ft.settings.cell import CellConfig, TrainConfig
from sparse_ft.settings.commands import MaskConfig
from sparse_ft.study import worker
from sparse_ft.study.jobs import CellJob
from sparse_ft.tracking import live as sending
from sparse_ft.tracking.live import LivePoints
from sparse_ft.tracking.runs import Tracker

STEPS = 30
TRAINED = {"train/loss_curve", "train/learning_rate", "train/grad_norm", "train/tokens_per_second_curve"}
TUNED = {"method": "unstructured", "importance": "wanda", "scope": "row", "reconstruct": "block",
         "reconstruct_epochs": 1, "calibration_samples": 4, "calibration_seq_len": 32, "data_dir": "made"}  # fmt: skip


@pytest.fixture(autouse=True)
def _prompt(monkeypatch):
    monkeypatch.setattr(sending, "EVERY_SECONDS", 0.05)


@pytest.fixture
def job(tmp_path, small):
    """A cell that trains a while; a try of it goes into a run of its own."""

    def job(**how):
        values = {**small, "max_steps": STEPS, "perplexity_tokens": 0, "score_untuned": False}
        return CellJob(CellConfig(model="tiny-llama", mode="dense", **values), None, tmp_path / "cell", "key", **how)

    return job


def _until(condition):
    give_up = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < give_up
        time.sleep(0.02)
    return found


def _points(tracker, run_id, metric):
    return [(point.step, point.timestamp) for point in tracker.client.get_metric_history(run_id, metric)]


def _check_whole(tracker, run_id, notes):
    """Every step is there once, in its order and at its time, with the loss that was shown."""
    for metric in TRAINED:
        steps, times = zip(*_points(tracker, run_id, metric), strict=True)
        assert list(steps) == list(range(1, STEPS + 1)), metric
        assert list(times) == sorted(times) and times[0] < times[STEPS // 2] < times[-1], metric
    assert [f"loss {loss:.4f}" for _, loss in tracker.curve(run_id, "train/loss_curve")] == notes
    assert all(rate > 0 for _, rate in tracker.curve(run_id, "train/learning_rate"))


def test_a_running_cell_has_its_curves_and_ends_with_each_point_once(tmp_path, job):
    tracker, opened, seen = Tracker(), [], {}
    setup = Prompt(tracker.uri, tracker.start("study"), tmp_path / "untuned")

    def look():
        seen["points"] = _until(lambda: _points(tracker, opened[0], "train/loss_curve"))
        seen["status"] = tracker.run(opened[0]).status

    def rungs(step, loss):
        return False

    rungs.rungs = (5,)
    shown = AtStep({20: look})
    outcome = setup.build().run(job(judge=rungs), shown, opened.append)
    assert outcome.status == "FINISHED" and seen["status"] == "RUNNING"
    assert [step for step, _ in seen["points"]][:2] == [1, 2] and len(seen["points"]) < STEPS
    _check_whole(tracker, outcome.run_id, shown.notes)
    ((step, at),) = _points(tracker, outcome.run_id, "eval/loss_while_training")
    losses = dict(_points(tracker, outcome.run_id, "train/loss_curve"))
    assert step == 5 and losses[4] <= at <= losses[6]


@pytest.fixture
def away(tmp_path, empty_store):
    """A server that can be killed and started again where it was; and its store."""
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copyfile(empty_store, folder / "mlflow.db")
    store = f"sqlite:///{folder}/mlflow.db"
    with ExitStack() as running:

        def start(address=None):
            port = address and int(address.rpartition(":")[2])
            return running.enter_context(mlflow_server(folder, store, port=port))

        yield start, running.close, store


@pytest.mark.slow
def test_a_server_that_comes_back_has_every_point_of_every_step(tmp_path, job, away):
    start, kill, _ = away
    address = start()
    tracker, opened, seen = Tracker(address), [], []
    setup = Prompt(address, tracker.start("study"), tmp_path / "untuned")

    def kill_it():
        seen.extend(_until(lambda: _points(tracker, opened[0], "train/loss_curve")))
        kill()

    shown = AtStep({5: kill_it, 25: lambda: start(address)})
    outcome = setup.build().run(job(), shown, opened.append)
    assert outcome.status == "FINISHED" and 0 < len(seen) <= 5
    _check_whole(tracker, outcome.run_id, shown.notes)
    assert not (tmp_path / "unsent").exists()


@pytest.mark.slow
def test_a_server_that_stays_away_costs_no_step_and_leaves_the_rest_in_a_file(tmp_path, job, away, monkeypatch):
    start, kill, store = away
    address = start()
    tracker, opened = Tracker(address), []
    setup = Prompt(address, tracker.start("study"), tmp_path / "untuned")
    monkeypatch.setattr(sending, "PATIENCE_SECONDS", 1)
    monkeypatch.setattr(worker, "_PAUSE", 0)

    def kill_it():
        _until(lambda: _points(tracker, opened[0], "train/loss_curve"))
        kill()

    shown = AtStep({5: kill_it})
    began = time.monotonic()
    outcome = setup.build().run(job(), shown, opened.append)
    assert time.monotonic() - began < 60  # mlflow itself would try for minutes, call by call
    assert len(shown.notes) == STEPS
    assert (outcome.status, outcome.failure.kind) == ("FAILED", "infrastructure")
    file = tmp_path / "unsent" / f"unsent_{opened[0]}.jsonl"
    assert str(file) in outcome.failure.message and address in outcome.failure.message
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    there = Tracker(store)
    for metric in TRAINED:
        sent = [step for step, _ in _points(there, opened[0], metric)]
        left = [entry["step"] for entry in kept if entry["metric"] == metric]
        # What was under way when the server died may be in both: it did not answer.
        assert sent and left and sorted({*sent, *left}) == list(range(1, STEPS + 1))
        assert len(set(sent)) == len(sent) and len(set(left)) == len(left)


class AtBlock(Progress):
    """Calls ``then`` when the pruning comes to its second block."""

    def __init__(self, then):
        self._then = [then]

    def advance(self, amount=1, note=""):
        if note.startswith("block 2 ") and self._then:
            self._then.pop()()


def test_blocks_have_their_errors_while_others_are_pruned(tmp_path):
    tracker, config = Tracker(), MaskConfig(model="tiny-llama", sparsities=(0.5, 0.6), **TUNED)
    run_id, other = tracker.start("masks"), tracker.start("masks")
    seen = []
    bench = Workbench(AtBlock(lambda: seen.extend(_until(lambda: tracker.curve(run_id, "prune/block_error_60")))))
    with live(tracker, run_id, bench, tmp_path) as points:
        files = make_masks(config, bench, tmp_path / "masks")
    log_masks(tracker, run_id, files, points)
    log_masks(tracker, other, files, LivePoints(tracker, other, tmp_path))  # as of blocks that were done before
    assert len(seen) == 1
    for file, level in zip(files, ("50", "60"), strict=True):
        blocks = file.metadata["reconstruction"]["blocks"]
        assert len(blocks) > 1 and blocks[0]["before"] > blocks[0]["after"] > 0
        changed = list(enumerate(file.metadata["block_errors"], 1))
        assert len(changed) == len(blocks)
        for run in (run_id, other):
            assert tracker.curve(run, f"prune/block_error_{level}") == changed
        for when in ("before", "after"):
            curve = [(number, errors[when]) for number, errors in enumerate(blocks, 1)]
            for run in (run_id, other):
                assert tracker.curve(run, f"prune/error_{when}_{level}") == curve
        assert dict(tracker.curve(run_id, "sparsity/achieved"))[int(level)] == file.achieved


def test_a_single_cell_has_the_curves_of_all_that_it_does(tmp_path, small):
    cell = {"model": "tiny-llama", "sparsity": 0.5, "mode": "sparse_to_sparse", "recover_steps": 4, "teacher": "dense",
            "recover_batch_size": 2, "recover_seq_len": 32, **TUNED}  # fmt: skip
    assert train(TrainConfig(**small | cell, output_dir=str(tmp_path / "out"))) == 0
    (run,) = Tracker().search()
    counts = dict.fromkeys(TRAINED, 2)
    counts |= dict.fromkeys(
        ("recover/loss", "recover/learning_rate", "recover/grad_norm", "recover/tokens_per_second_curve"), 4
    )
    counts |= dict.fromkeys(("recover/ce", "recover/kl", "recover/squarehead"), 4)
    counts |= dict.fromkeys(("prune/block_error_50", "prune/error_before_50", "prune/error_after_50"), 2)
    for metric, count in counts.items():
        steps, times = zip(*_points(Tracker(), run.run_id, metric), strict=True)
        assert list(steps) == list(range(1, count + 1)), metric
        assert list(times) == sorted(times), metric
    table = cell_table([run])
    assert "train_loss_curve" in table.columns and "train_grad_norm" not in table.columns

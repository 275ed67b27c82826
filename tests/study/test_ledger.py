"""Going on with a study: what is skipped, what is tried again and how often, and what a changed file says."""

import time
from collections import Counter
from dataclasses import replace

import earlier
import pytest

from sparse_ft import __version__
from sparse_ft.cell.identity import versions
from sparse_ft.errors import UserError
from sparse_ft.processes import process_name
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study import heartbeat
from sparse_ft.study.driver import sweep
from sparse_ft.tracking.runs import Tracker


@pytest.fixture
def config(study_file, tmp_path):
    """The configuration of a study; called again it writes the file anew."""

    def write(grid, **rest):
        path = study_file(grid, **{"dense_baseline": False, "keep": "none", **rest})
        return SweepConfig(config=str(path), output_dir=str(tmp_path / "out"))

    return write


def _study():
    tracker = Tracker()
    (parent,) = [run for run in tracker.search() if run.tags.get("kind") == "study"]
    return parent, [run for run in tracker.children(parent.run_id) if run.tags["kind"] == "cell"]


@pytest.mark.slow
def test_a_changed_configuration_says_what_changed_and_keeps_what_is_the_same(config, capsys):
    grid = {"model": ["tiny-llama"], "sparsity": [0.3, 0.5], "mode": ["sparse_to_sparse"]}
    assert sweep(config(grid, keep="pareto")) == 0
    parent, before = _study()
    capsys.readouterr()
    changed = config(grid | {"sparsity": [0.5, 0.7], "seed": [0]}, cell={"max_steps": 2}, keep="adapter")
    assert sweep(replace(changed, resume=parent.run_id)) == 0
    shown = capsys.readouterr().out
    assert "1 of 2 cells are done" in shown
    lines = [line.strip() for line in shown.splitlines() if "the configuration has changed" in line]
    assert [line.removeprefix("the configuration has changed: ") for line in lines] == [
        "grid.seed is new: [0]",
        "grid.sparsity: [0.3, 0.5] -> [0.5, 0.7]",
        "keep: pareto -> adapter",
    ]
    again, cells = _study()
    assert again.run_id == parent.run_id
    new = [run for run in cells if run.run_id not in {old.run_id for old in before}]
    assert [run.params["cfg/sparsity"] for run in new] == ["0.7"]
    assert Counter(run.status for run in cells) == {"FINISHED": 3}
    capsys.readouterr()
    assert sweep(replace(changed, resume=parent.run_id)) == 0  # the file has not changed since
    assert "the configuration has changed" not in capsys.readouterr().out
    assert len(_study()[1]) == 3


@pytest.mark.slow
def test_a_study_of_version_0_1_0_runs_again_and_its_cells_are_no_part_of_the_results(config, capsys):
    file = config({"model": ["tiny-llama"], "sparsity": [0.3, 0.5], "mode": ["sparse_to_sparse"]})
    assert sweep(file) == 0
    parent, before = _study()
    earlier.forget(Tracker().uri)
    capsys.readouterr()
    assert sweep(replace(file, resume=parent.run_id)) == 0
    shown = capsys.readouterr().out
    assert "0 of 2 cells are done" in shown and "as those of version 0.1.0: they run again" in shown
    _, cells = _study()
    old = {run.run_id for run in before}
    assert len(cells) == 4 and {run.run_id for run in cells if "superseded" in run.tags} == old
    assert sweep(replace(file, resume=parent.run_id)) == 0
    assert "2 of 2 cells are done" in capsys.readouterr().out and len(_study()[1]) == 4


@pytest.mark.slow
def test_a_study_of_another_version_says_so_and_runs_again(config, capsys, monkeypatch):
    """The version stands in the identity of every cell and mask set, whatever else is the same."""
    file = config({"model": ["tiny-llama"], "sparsity": [0.5], "mode": ["sparse_to_sparse"]})
    with monkeypatch.context() as before:
        before.setattr("sparse_ft.__version__", "0.1.0")
        versions.cache_clear()
        assert sweep(file) == 0
    versions.cache_clear()
    parent, (old,) = _study()
    capsys.readouterr()
    assert sweep(replace(file, resume=parent.run_id)) == 0
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "has changed" in line]
    assert "sparse_ft 0.1.0" in said and f"sparse_ft {__version__}" in said and "run again" in said
    _, cells = _study()
    assert [run.run_id for run in cells if "superseded" in run.tags] == [old.run_id]
    (new,) = [run for run in cells if run.run_id != old.run_id]
    assert new.tags["cell_key"] != old.tags["cell_key"]
    assert new.tags["mask_checksum"] == old.tags["mask_checksum"]


@pytest.mark.slow
def test_failed_cells_are_tried_again_up_to_max_retries_in_every_start(config, capsys):
    study = config({"model": ["tiny-llama"], "mode": ["dense"]}, cell={"max_steps": 100_000})

    def start(**values):
        status = sweep(replace(study, cell_seconds=0.5, resume=resume, **values))
        _, cells = _study()
        return status, [(run.status, run.tags.get("failure_class"), run.tags["attempt"]) for run in cells]

    def failed(count):
        return [("FAILED", "timeout", str(number)) for number in range(1, count + 1)]

    resume = None
    assert start(max_retries=1) == (1, failed(2))
    resume = _study()[0].run_id
    assert start(max_retries=0) == (1, failed(2))  # nothing that failed is tried again
    assert "1 of 1 cells failed" in capsys.readouterr().out
    assert start(max_retries=1) == (1, failed(3))
    assert start(max_retries=2) == (1, failed(5))


@pytest.mark.slow
def test_what_cannot_end_differently_is_not_tried_again(config, capsys):
    grid = {"model": ["tiny-llama"], "mode": ["dense"], "learning_rate": [9.0]}
    study = config(grid, cell={"max_steps": 60, "max_seq_len": 64})
    for _ in range(2):
        assert sweep(study) == 1
        parent, cells = _study()
        assert [run.tags["failure_class"] for run in cells] == ["non_finite_loss"]
        assert "non_finite_loss" in capsys.readouterr().out  # the hole is named every time
        study = replace(study, resume=parent.run_id, max_retries=5)
    Tracker().delete(cells[0].run_id)  # whoever deletes the failed run has it run again
    assert sweep(study) == 1
    (again,) = _study()[1]
    assert again.run_id != cells[0].run_id
    # Whoever asks for it has it tried again, on the command line or in the file; that is no change of the study.
    capsys.readouterr()
    assert sweep(replace(study, retry="non_finite_loss", max_retries=1)) == 1
    assert len(_study()[1]) == 2
    config(grid, cell={"max_steps": 60, "max_seq_len": 64}, retry=["bug", "non_finite_loss"])
    assert sweep(replace(study, max_retries=1)) == 1
    assert len(_study()[1]) == 3
    assert "the configuration has changed" not in capsys.readouterr().out
    config(grid, cell={"max_steps": 60, "max_seq_len": 64}, retry=["bugs"])
    with pytest.raises(UserError, match="there is no failure class 'bugs'"):
        sweep(study)


@pytest.mark.slow
def test_only_a_study_that_nobody_drives_is_resumed(config):
    study = config({"model": ["tiny-llama"], "mode": ["dense"]})
    assert sweep(study) == 0
    parent, (cell,) = _study()
    with pytest.raises(UserError, match="is no study"):
        sweep(replace(study, resume=cell.run_id))
    with pytest.raises(UserError, match="there is no run"):
        sweep(replace(study, resume="0" * 32))
    tracker = Tracker()
    tracker.reopen(parent.run_id)  # the driver it names, this process, lives
    with pytest.raises(UserError, match="still running"):
        sweep(replace(study, resume=parent.run_id))
    tracker.log(parent.run_id, tags={"driver": "elsewhere 1 0", "heartbeat": 0})
    assert sweep(replace(study, resume=parent.run_id)) == 0
    assert len(_study()[1]) == 1


def test_the_same_command_typed_twice_starts_one_study(config, capsys):
    study = config({"model": ["tiny-llama"], "mode": ["dense"]})
    assert sweep(study) == 0
    parent, _ = _study()
    tracker = Tracker()
    tracker.reopen(parent.run_id)
    tracker.log(parent.run_id, tags={"complete": False})
    with pytest.raises(UserError, match=r"is being run already \(process \d+ on .*resume=new"):
        sweep(study)
    assert len(_study()[1]) == 1


def test_a_driver_of_the_same_host_name_in_another_boot_is_believed_by_its_heartbeat(config, monkeypatch):
    tracker = Tracker()
    host, number, began, _ = process_name().split(" ")
    elsewhere = {"kind": "study", "driver": f"{host} {number} {began} 000000000000 t", "heartbeat": time.time()}
    run = tracker.run(tracker.start("study", elsewhere))
    assert f"process {number} on {host}" in heartbeat.living_driver(tracker, run)
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.2)
    tracker.log(run.run_id, tags={"heartbeat": 1.0})
    assert heartbeat.living_driver(tracker, tracker.run(run.run_id)) is None


def test_a_driver_whose_study_was_taken_over_ends_and_leaves_the_run_alone(monkeypatch):
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.1)
    tracker = Tracker()
    parent = tracker.start("study", {"kind": "study", "driver": "mine"})
    with (
        pytest.raises(heartbeat.TakenOverError, match="was taken over by another driver"),
        heartbeat.interruptible(),
        heartbeat.driving(tracker, parent, "mine") as lost,
    ):
        assert not lost()
        tracker.log(parent, tags={"driver": "another"})
        time.sleep(30)  # woken up
    assert tracker.run(parent).status == "RUNNING"

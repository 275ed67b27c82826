import json
import sqlite3
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from sparse_ft.errors import UserError
from sparse_ft.files import load_yaml
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.settings.search import SearchSettings
from sparse_ft.study.driver import sweep
from sparse_ft.study.search.session import best_trials, plan_search
from sparse_ft.study.search.trials import Judge, open_search, propose
from sparse_ft.study.study_file import load_study
from sparse_ft.tracking.runs import Tracker

RATE = {"low": 1e-5, "high": 1e-2, "log": True}


@pytest.fixture
def run_search(study_file, tmp_path):
    def run(search, **cell):
        path = study_file(
            {}, name="search", cell={"model": "tiny-llama", "score_untuned": False, **cell}, search=search
        )
        status = sweep(SweepConfig(config=str(path), output_dir=str(tmp_path / "out")))
        tracker = Tracker()
        (parent,) = [run for run in tracker.search() if run.tags.get("kind") == "study"]
        (trials,) = (tmp_path / "out").glob("*/trials.json")
        return status, tracker, parent, json.loads(trials.read_text())

    return run


@pytest.mark.slow
def test_one_objective_ends_with_the_best_trial(run_search, tmp_path, capsys):
    space = {"learning_rate": RATE, "lora_r": [2, 4], "max_steps": {"low": 2, "high": 4, "step": 2}}
    status, tracker, parent, trials = run_search({"space": space, "trials": 3})
    assert (status, parent.status, parent.tags["complete"]) == (0, "FINISHED", "true")
    assert [trial["state"] for trial in trials] == ["COMPLETE"] * 3
    cells = {run.run_id: run for run in tracker.children(parent.run_id) if run.tags["kind"] == "cell"}
    assert len(cells) == 3
    for trial in trials:
        run = cells[trial["run_id"]]
        assert trial["values"]["eval/loss"] == run.metrics["eval/loss"]
        assert float(run.params["cfg/learning_rate"]) == trial["params"]["learning_rate"]
    best = min(trials, key=lambda trial: trial["values"]["eval/loss"])
    assert [trial["best"] for trial in trials] == [trial is best for trial in trials]
    assert parent.metrics["best/eval/loss"] == best["values"]["eval/loss"]
    assert cells[best["run_id"]].tags["best"] == "true"
    note = parent.tags["mlflow.note.content"]
    row = f"| {best['number']}&nbsp;&nbsp; | {best['params']['learning_rate']}&nbsp;&nbsp; | "
    assert row in note and parent.tags["command"] in note
    assert {"search/search.png", "search/trials.json"} <= set(tracker.artifacts(parent.run_id))
    assert "best trial" in capsys.readouterr().out


@pytest.mark.slow
def test_two_objectives_end_with_a_front_over_shared_masks(run_search):
    space = {"sparsity": [0.2, 0.8], "lora_r": [2, 4]}
    status, tracker, parent, trials = run_search({"space": space, "trials": 4, "objective": "accuracy_sparsity"})
    assert status == 0
    children = tracker.children(parent.run_id)
    assert len([run for run in children if run.tags["kind"] == "masks"]) == 1
    for trial in trials:
        assert trial["values"]["sparsity/after_merge"] == pytest.approx(trial["params"]["sparsity"], abs=1e-3)
    assert any(trial["best"] for trial in trials)
    assert tracker.curve(parent.run_id, "pareto/accuracy")


@pytest.mark.slow
def test_trials_that_fall_behind_are_stopped_and_are_no_cells(run_search):
    # Of the trials at the only rung every second one goes on; a learning rate of nearly nothing loses.
    search = {"space": {"learning_rate": [1e-2, 1e-9]}, "trials": 6, "first_rung": 2, "reduction_factor": 2, "seed": 3}
    status, tracker, _, trials = run_search(search, max_steps=4)
    assert status == 0
    states = [trial["state"] for trial in trials]
    assert set(states) == {"COMPLETE", "PRUNED"}
    for trial in trials:
        run = tracker.run(trial["run_id"])
        stopped = trial["state"] == "PRUNED"
        assert run.tags["kind"] == ("stopped trial" if stopped else "cell")
        assert ("eval/accuracy" in run.metrics) != stopped
        assert [step for step, _ in tracker.curve(run.run_id, "eval/loss_while_training")] == [2]
        assert list(trial["losses"]) == ["2"]
        assert "train/tokens_per_second" not in run.metrics  # scoring in between would count as training


def test_steps_that_are_not_known_yet_cannot_be_counted_to(study_file):
    for cell, space in (({"num_epochs": 1}, {"lora_r": [2, 4]}), ({}, {"num_epochs": [1, 2]})):
        path = study_file(
            {}, cell={"model": "tiny-llama", **cell}, search={"space": space, "trials": 2, "first_rung": 1}
        )
        with pytest.raises(UserError, match="first_rung counts steps, and num_epochs leaves open"):
            sweep(SweepConfig(config=str(path)))


def test_a_trial_whose_worker_is_gone_is_proposed_again(tmp_path):
    storage = f"sqlite:///{tmp_path}/optuna.db"
    settings = SearchSettings({"lora_r": [2, 4, 8]}, trials=2)
    study = open_search(storage, "s", settings)
    lost = study.ask()
    rank = lost.suggest_categorical("lora_r", [2, 4, 8])
    # What a worker that was killed leaves behind: RUNNING, with a heartbeat of long ago.
    with sqlite3.connect(tmp_path / "optuna.db") as database:
        database.execute(
            "INSERT INTO trial_heartbeats (trial_id, heartbeat) SELECT trial_id, '2020-01-01 00:00:00' FROM trials"
        )
    again = open_search(storage, "s", settings)
    values = []
    again.optimize(lambda trial: values.append(propose(trial, settings, CellConfig()).lora_r) or 0.0, n_trials=1)
    assert values == [rank]
    assert [trial.state for trial in again.trials] == [TrialState.FAIL, TrialState.COMPLETE]


@pytest.mark.slow
def test_a_search_resumes_with_the_trials_that_are_left(study_file, tmp_path):
    search = {"space": {"lora_r": [2, 4]}, "trials": 1}
    path = study_file({}, name="search", cell={"model": "tiny-llama", "mode": "dense"}, search=search)
    config = SweepConfig(config=str(path), output_dir=str(tmp_path / "out"))
    assert sweep(config) == 0
    tracker = Tracker()
    (parent,) = [run for run in tracker.search() if run.tags.get("kind") == "study"]
    study_file({}, name="search", cell={"model": "tiny-llama", "mode": "dense"}, search={**search, "trials": 3})
    assert sweep(SweepConfig(**{**vars(config), "resume": parent.run_id})) == 0
    cells = [run for run in tracker.children(parent.run_id) if run.tags["kind"] == "cell"]
    assert len(cells) == 3
    assert {run.status for run in cells} == {"FINISHED"}


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"space": {"lora_rank": [1]}}, "lora_rank"),
        ({"space": {"mode": ["sparse"]}}, "sparse"),
        ({"space": {"lora_r": 3}}, "list of choices, or a range"),
        ({"space": {"sparsity": {"low": 0.1, "high": 0.9}}}, "must be a list"),
        ({"space": {"lora_r": [2]}, "objective": "speed"}, "accuracy_sparsity"),
        ({"space": {"lora_r": [2]}, "objective": "accuracy_sparsity", "first_rung": 2}, "first_rung"),
        ({"space": {"lora_r": [2]}, "trials": "many"}, "whole number"),
        ({"space": {}}, "empty"),
        ({"spaces": {}}, "spaces"),
    ],
)
def test_what_a_search_cannot_mean_is_said_in_one_line(search, said):
    with pytest.raises(UserError, match=said) as raised:
        SearchSettings.parse(search, "Study s")
    assert "\n" not in str(raised.value)


def test_a_search_that_stops_trials_midway_is_refused_where_its_trainer_cannot(study_file, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_FT_CEREBRAS_PYTHON", str(tmp_path / "python"))
    search, cell = {"space": {"lora_r": [2]}, "trials": 1}, {"model": "tiny-llama"}
    for rung, said in ((1, "stops trainings midway, which trainer cerebras cannot"), (0, "There is no Python at")):
        path = study_file({}, name="search", cell=cell, search={**search, "first_rung": rung}, trainer="cerebras")
        with pytest.raises(UserError, match=said):
            sweep(SweepConfig(config=str(path), output_dir=str(tmp_path / "out")))
    assert Tracker().search() == []


def test_a_search_names_a_gpu_that_no_worker_would_see_before_any_run(study_file, tmp_path):
    cell = {"model": "tiny-llama", "device": "cuda:1"}
    path = study_file({}, name="search", cell=cell, search={"space": {"lora_r": [2]}, "trials": 1})
    with pytest.raises(UserError, match="a worker of executor process sees its own GPUs alone"):
        sweep(SweepConfig(config=str(path), executor="process", output_dir=str(tmp_path / "out")))
    assert Tracker().search() == []


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("sqlite:///{folder}/mlflow.db", "give the search a database of its own"),
        ("sqlite:///{folder}/nowhere/optuna.db", "unable to open database file"),
        ("mysql+nodriver://me:secret@host/db", "cannot be used"),
    ],
)
def test_a_storage_that_cannot_be_used_is_said_before_any_run(study_file, tmp_path, storage, said):
    Tracker().search()  # MLflow's tables are there
    search = {"space": {"lora_r": [2]}, "trials": 1, "storage": storage.format(folder=tmp_path)}
    path = study_file({}, name="search", cell={"model": "tiny-llama"}, search=search)
    with pytest.raises(UserError, match=said) as raised:
        sweep(SweepConfig(config=str(path), output_dir=str(tmp_path / "out")))
    assert "\n" not in str(raised.value) and "secret" not in str(raised.value)
    assert Tracker().search() == []


def test_rungs_are_apart_by_the_reduction_factor():
    assert SearchSettings({"lora_r": [1]}, first_rung=4, reduction_factor=3).rungs(100) == (4, 12, 36)
    assert SearchSettings({"lora_r": [1]}).rungs(100) == ()


def test_the_judge_stops_the_worse_half():
    study = optuna.create_study(pruner=optuna.pruners.SuccessiveHalvingPruner(1, 2))
    stopped = [Judge(study.ask(), [1])(1, loss) for loss in (1.0, 2.0, 0.5, 3.0)]
    assert stopped == [False, True, False, True]


def test_the_front_of_two_objectives_and_the_best_of_one():
    def best(directions, *points):
        study = optuna.create_study(directions=directions)
        study.add_trials([optuna.trial.create_trial(values=list(point)) for point in points])
        return [tuple(trial.values) for trial in best_trials(study)]

    assert best(["maximize"] * 2, (0.8, 0.5), (0.7, 0.4), (0.9, 0.1)) == [(0.9, 0.1), (0.8, 0.5)]
    assert best(["minimize"], (3.0,), (1.0,), (2.0,), (1.0,)) == [(1.0,)]
    assert best(["minimize"]) == []


def test_the_searches_of_the_repository_are_sound():
    for name in ("search", "search_front"):
        study = load_study(Path(__file__).resolve().parents[3] / "configs" / f"{name}.yaml")
        SearchSettings.parse(study.search, name)


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        ("learning_rate: {low: 3e-4, high: 5e-5, log: true}", "low must be below high"),
        ("learning_rate: {low: 1e-4, high: 1e-4}", "low must be below high"),
        ("learning_rate: {low: 0, high: 1e-4, log: true}", "begins above 0"),
        ("learning_rate: {low: .nan, high: 1e-4}", "must be a number"),
        ("max_steps: {low: 1.5, high: 4}", "must be a whole number"),
        ("max_steps: {low: true, high: 4}", "must be a number"),
        ("max_steps: {low: 2, high: 8, step: 0}", "step must be above 0"),
        ("max_steps: {low: 2, high: 8, step: 2, log: true}", "goes without log"),
        ("max_steps: [1e1, 10]", "a choice twice"),
        ("mode: {low: 1, high: 2}", "is no number"),
        ("lora_s: {low: 1, high: 2}", "there is no field 'lora_s'"),
    ],
)
def test_a_range_that_is_none_is_said_in_one_line(axis, said):
    with pytest.raises(UserError, match=said):
        SearchSettings.parse({"space": load_yaml(axis)}, "Study x")


def test_numbers_of_yaml_are_numbers():
    settings = SearchSettings.parse(
        load_yaml("{trials: 1e1, space: {learning_rate: {low: 1e-4, high: 1e-2}, max_steps: [1e1, 2e1]}}"), "Study x"
    )
    assert (settings.trials, settings.space["max_steps"]) == (10, [10, 20])
    assert settings.space["learning_rate"] == {"low": 1e-4, "high": 1e-2, "log": False}


@pytest.mark.parametrize(
    ("name", "cell", "refused"),
    [
        ("calibration_samples", {"importance": "wanda", "task": "boolq"}, True),
        ("calibration_seq_len", {"importance": "sparsegpt", "task": "boolq"}, True),
        ("seed", {"method": "random"}, True),
        ("seed", {}, False),  # of the training alone
        ("lora_r", {}, False),
    ],
)
def test_a_range_over_what_decides_masks_is_refused_before_any_run(study_file, name, cell, refused):
    search = {"space": {name: {"low": 2, "high": 8}}}
    study = load_study(study_file({}, cell={"model": "tiny-llama", **cell}, search=search))
    settings = SearchSettings.parse(study.search, "Study x")
    if refused:
        with pytest.raises(UserError, match=f"space.{name} must be a list"):
            plan_search(study, settings)
    else:
        assert len(plan_search(study, settings).cells) == 1


def test_a_search_is_not_resumed_under_other_choices(study_file, tmp_path):
    def config(choices, **values):
        search = {"space": {"lora_r": choices}, "trials": 1}
        path = study_file({}, name="search", cell={"model": "tiny-llama", "score_untuned": False}, search=search)
        return SweepConfig(config=str(path), output_dir=str(tmp_path / "out"), **values)

    assert sweep(config([2, 4])) == 0
    (parent,) = [run for run in Tracker().search() if run.tags.get("kind") == "study"]
    with pytest.raises(UserError, match=r"resume: .*lora_r: \[2, 4\] -> \[2, 4, 8\]"):
        sweep(config([2, 4, 8], resume=parent.run_id))
    assert Tracker().run(parent.run_id) == parent  # nothing was written

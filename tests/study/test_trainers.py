"""How a study chooses who trains its cells, and what a trainer of one's own is given."""

from dataclasses import replace

import pytest

from sparse_ft.cell.trainer import LOCAL, LocalTrainer
from sparse_ft.cerebras.trainer import CerebrasTrainer
from sparse_ft.errors import UserError
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.driver import sweep
from sparse_ft.study.jobs import CellJob
from sparse_ft.study.study_file import Study, load_study
from sparse_ft.study.trainers import study_trainer
from sparse_ft.study.worker import WorkerSetup
from sparse_ft.tracking.runs import Tracker


class OwnTrainer(LocalTrainer):
    """Notes what it is given, and what it lacks."""

    def __init__(self, lacks=()):
        self.watches, self.lacks = [], list(lacks)

    def missing(self):
        return self.lacks

    def train(self, training):
        self.watches.append(training.watch)
        for step, loss in ((1, 0.5), (2, 0.25)):
            training.progress.measured(step, {"own/loss": loss})
        return super().train(training)


@pytest.fixture
def run(tmp_path, small):
    """Runs a dense cell with a trainer; returns its run."""
    tracker = Tracker()
    parent = tracker.start("study", {"kind": "study"})

    def run(trainer, **tags):
        cell = CellConfig(model="tiny-llama", mode="dense", score_untuned=False, **small)
        setup = WorkerSetup(tracker.uri, parent, tmp_path / "untuned", trainer)
        outcome = setup.build().run(CellJob(cell, None, tmp_path / "cell", key="key", tags=tags))
        return tracker.run(outcome.run_id)

    return run


@pytest.mark.slow
def test_a_trainer_knows_its_run_writes_into_it_and_hears_of_a_smaller_batch(run):
    trainer = OwnTrainer()
    first, second = run(trainer), run(trainer, reduced_batch="2 -> 1")
    assert (first.status, second.status) == ("FINISHED", "FINISHED")
    assert [watch.run_id for watch in trainer.watches] == [first.run_id, second.run_id]
    assert [watch.reduced for watch in trainer.watches] == [False, True]
    assert Tracker().curve(first.run_id, "own/loss") == [(1, 0.5), (2, 0.25)]


def test_what_a_trainer_lacks_ends_a_cell_before_anything_is_loaded(run):
    failed = run(OwnTrainer(["there is no wafer"]))
    assert failed.tags["failure_class"] == "configuration"
    assert failed.tags["failure_message"] == "there is no wafer"
    assert "base_fingerprint" not in failed.tags


def test_a_study_names_its_trainer_and_the_command_overrules_it(study_file):
    grid = {"model": ["tiny-llama"], "sparsity": [0.5]}
    assert load_study(study_file(grid)).trainer == "local"
    assert load_study(study_file(grid, trainer="cerebras")).trainer == "cerebras"
    with pytest.raises(UserError, match="trainer is 'wafer'; it must be local"):
        load_study(study_file(grid, trainer="wafer"))
    config = SweepConfig(config="s.yaml")
    assert study_trainer("local", config) is LOCAL
    assert isinstance(study_trainer("cerebras", config), CerebrasTrainer)


def test_a_trainer_that_takes_the_whole_cluster_runs_one_cell_at_a_time(study_file):
    path = study_file({"model": ["no/such"], "sparsity": [0.5]})
    with pytest.raises(UserError, match="trainer cerebras runs with executor serial, not process") as refused:
        sweep(SweepConfig(config=str(path), executor="process", trainer="cerebras"))
    assert "no/such" not in str(refused.value)  # said before a model is looked for


def test_a_resumed_study_says_that_its_trainer_was_another():
    study = Study("s", {"sparsity": [0.5]})
    assert "trainer" not in study.plain()  # as in the files of older versions
    assert replace(study, trainer="cerebras").plain()["trainer"] == "cerebras"

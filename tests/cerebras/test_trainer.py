"""Cells trained by ModelZoo's trainer. The whole way needs an environment with ModelZoo, whose interpreter is named by
SPARSE_FT_CEREBRAS_PYTHON (make test-modelzoo does so), and runs on the trainer's CPU device."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from sparse_ft.cell.failures import classify
from sparse_ft.cell.training import Watch
from sparse_ft.cerebras.logs import Failure
from sparse_ft.cerebras.runner import TrainerError
from sparse_ft.cerebras.trainer import CerebrasSettings, check_trainable, load_settings, settings_of_try
from sparse_ft.commands.train import train
from sparse_ft.errors import UserError
from sparse_ft.settings.cell import CellConfig, TrainConfig
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.driver import sweep
from sparse_ft.study.jobs import CellJob
from sparse_ft.study.session import resume_command
from sparse_ft.tracking.runs import Tracker

MODELZOO = os.environ.get("SPARSE_FT_CEREBRAS_PYTHON")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("made_store")


@pytest.fixture
def settings_file(tmp_path):
    def write(**values):
        path = tmp_path / "cerebras.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return write


def test_settings_come_from_a_file(settings_file):
    path = settings_file(python="/x/python", device="CPU", cluster={"num_csx": 2, "mount_dirs": ["/data"]})
    settings = load_settings(path)
    assert (settings.python, settings.device, settings.retries) == ("/x/python", "CPU", 2)
    assert (settings.cluster.num_csx, settings.cluster.mount_dirs) == (2, ("/data",))
    assert load_settings() == CerebrasSettings()
    for wrong in ({"pyton": "x"}, {"cluster": {"wafers": 1}}):
        with pytest.raises(UserError, match="unknown field"):
            load_settings(settings_file(**wrong))
    with pytest.raises(UserError, match="cannot be read"):
        load_settings("none.yaml")


def test_what_is_missing_is_said_at_once_and_before_any_run(study_file, settings_file, tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')  # no site-packages
    bare.chmod(bare.stat().st_mode | stat.S_IXUSR)
    grid = {"model": ["tiny-llama", "tiny-mistral", "no/such"], "target_modules": ["all", "q_proj"], "sparsity": [0.5]}
    study = study_file(grid, dense_baseline=False)
    config = SweepConfig(config=str(study), trainer="cerebras", cerebras=settings_file(python=str(bare)))
    with pytest.raises(UserError) as stop:
        sweep(config)
    for missing in ("cerebras-pytorch 2.10", "ModelZoo 2.10", "torch-cirh-opt is not on PATH"):
        assert missing in str(stop.value)
    # What its trainer cannot take is said then too, and once.
    assert str(stop.value).count("tiny-mistral cannot be trained on a Cerebras: The model's head_dim") == 1
    assert str(stop.value).count("cannot adapt q_proj") == 1
    assert str(stop.value).count("no/such") == 1
    assert "\n" not in str(stop.value)
    assert Tracker().search() == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train_data": "wikitext2"}, r"rows of one's own \(train_data\) are trained on here, not on a Cerebras"),
        ({"mix": "wikitext2"}, "not on a Cerebras"),
        ({"packing": True}, "packing is True, which trainer local alone can"),
        ({"schedule": "cosine"}, "schedule is cosine, which trainer local alone can"),
        ({"num_epochs": 2.0}, "num_epochs is 2.0"),
        ({"rslora": True}, "rslora is True"),
        ({"loss_on": "all"}, "loss_on is all"),
    ],
)
def test_what_modelzoos_trainer_has_not_is_refused(values, said):
    with pytest.raises(UserError, match=said):
        check_trainable(CellConfig(**values), {"model_type": "llama"}, CerebrasSettings())


def test_a_smaller_mixture_is_none_of_modelzoos():
    config = {"model_type": "mixtral"}
    with pytest.raises(UserError, match="take trainer local"):
        check_trainable(CellConfig(method="experts"), config, CerebrasSettings())


@pytest.mark.parametrize("kind", ["lost_connection", "disk_quota", "job_time_limit", "configuration_refused"])
def test_the_trainers_failures_keep_their_class(kind):
    assert classify(TrainerError(Failure(kind, "what it said"))).kind == kind


def test_after_running_out_of_memory_fewer_sequences_are_computed_at_a_time():
    job = CellJob(CellConfig(batch_size=8, gradient_accumulation=2), None, Path(), key="key")
    assert settings_of_try(CerebrasSettings(), job.cell, Watch()).cluster.micro_batch_size is None
    again = job.halved()
    assert again.cell.batch_size * again.cell.gradient_accumulation == 16  # the same step
    assert settings_of_try(CerebrasSettings(), again.cell, Watch(reduced=True)).cluster.micro_batch_size == 4


@pytest.mark.skipif(MODELZOO is None, reason="needs ModelZoo: make test-modelzoo MODELZOO=PATH")
def test_a_study_is_trained_merged_proven_and_scored(study_file, settings_file, tmp_path):
    grid = {"model": ["tiny-llama"], "sparsity": [0.6], "mode": ["sparse_to_dense", "sparse_to_sparse"]}
    study = study_file(grid, cell={"keep_samples": True}, dense_baseline=True)
    settings = settings_file(python=MODELZOO, device="CPU")
    options = {"trainer": "cerebras", "cerebras": settings, "output_dir": str(tmp_path / "out")}
    assert sweep(SweepConfig(config=str(study), **options)) == 0
    tracker = Tracker()
    cells = [run for run in tracker.search() if run.tags.get("kind") == "cell"]
    assert sorted(run.params["cfg/mode"] for run in cells) == ["dense", "sparse_to_dense", "sparse_to_sparse"]
    for run in cells:
        assert run.status == "FINISHED"
        assert run.metrics["sparsity/violations"] == 0
        assert 0 <= run.metrics["eval/accuracy"] <= 1
        assert [step for step, _ in tracker.curve(run.run_id, "cerebras/loss")] == [1, 2]  # as they came
        assert run.metrics["train/samples_per_second"] > 0
        files = set(tracker.artifacts(run.run_id))
        assert {"cerebras/fit.yaml", "cerebras/fit.log"} <= files
        assert [name for name in files if name.startswith("samples/")]
        assert 0 < run.metrics["train/weights_moved"] <= 1
        assert "eval/loss_adapter" not in run.metrics  # of a model that is nowhere in memory
    (sparse,) = [run for run in cells if run.params["cfg/mode"] == "sparse_to_sparse"]
    assert sparse.metrics["sparsity/after_merge"] == pytest.approx(0.6, abs=1e-3)
    (dense,) = [run for run in cells if run.params["cfg/mode"] == "sparse_to_dense"]
    assert "eval/accuracy_remasked" in dense.metrics


@pytest.mark.skipif(MODELZOO is None, reason="needs ModelZoo: make test-modelzoo MODELZOO=PATH")
def test_a_single_cell_is_trained_there(settings_file, small, tmp_path):
    there = {"trainer": "cerebras", "cerebras": settings_file(python=MODELZOO, device="CPU")}
    cell = {"model": "tiny-llama", "mode": "full", "sparsity": 0.6, "score_untuned": False, "keep": "all"}
    assert train(TrainConfig(**small, **cell, **there, output_dir=str(tmp_path / "cell"))) == 0
    (run,) = Tracker().search()
    assert (run.status, run.metrics["sparsity/violations"]) == ("FINISHED", 0)
    assert [step for step, _ in Tracker().curve(run.run_id, "cerebras/loss")] == [1, 2]
    assert (tmp_path / "cell" / "merged" / "config.json").is_file()
    assert not list((tmp_path / "cell").rglob("*.mdl"))


@pytest.mark.skipif(MODELZOO is None, reason="needs ModelZoo: make test-modelzoo MODELZOO=PATH")
def test_losses_come_while_it_trains_and_ctrl_c_leaves_no_trainer_behind(study_file, settings_file, tmp_path):
    study = study_file({"model": ["tiny-llama"], "sparsity": [0.6]}, cell={"max_steps": 100_000}, dense_baseline=False)
    settings, out = settings_file(python=MODELZOO, device="CPU"), tmp_path / "out"
    options = ["--trainer", "cerebras", "--cerebras", settings, "--output_dir", str(out)]
    with open(tmp_path / "sweep.log", "w") as log:
        command = [sys.executable, "-m", "entrypoints.sweep", "--config", str(study), *options]
        study_process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        tracker, deadline = Tracker(), time.monotonic() + 600
        losses = []
        while not losses:
            assert study_process.poll() is None and time.monotonic() < deadline, (tmp_path / "sweep.log").read_text()
            time.sleep(0.5)
            cells = [run for run in tracker.search() if run.tags.get("kind") == "cell"]
            losses = tracker.curve(cells[0].run_id, "cerebras/loss") if cells else []
        assert cells[0].status == "RUNNING"
        trainers = [p for p in psutil.Process(study_process.pid).children(recursive=True) if _trains(p)]
        assert trainers
        study_process.send_signal(signal.SIGINT)
        assert study_process.wait(120) != 0
    finally:
        study_process.kill()
    assert not [process for process in trainers if process.is_running()]
    assert not [process for process in psutil.process_iter() if _trains(process) and str(out) in _line(process)]
    assert tracker.run(cells[0].run_id).status == "KILLED"


def _trains(process):
    return "sparse_ft.cerebras.modelzoo.cszoo" in _line(process)


def _line(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_the_command_that_goes_on_with_a_study_names_where_it_trains():
    config = SweepConfig(config="c.yaml", trainer="cerebras", cerebras="my settings.yaml")
    command = resume_command(config, "abc")
    for option in ("executor=serial", "trainer=cerebras", "cerebras='my settings.yaml'"):
        assert f"-P {option}" in command
    assert "ray_address" not in command

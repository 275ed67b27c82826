"""Cells, a study and its workers on a GPU."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_ft.cell.masks import make_masks
from sparse_ft.cell.run import run_cell
from sparse_ft.cell.workbench import Workbench
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.settings.cell import CellConfig, mask_set_of
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.driver import sweep
from sparse_ft.study.executors.serial import SerialExecutor
from sparse_ft.study.jobs import CellJob
from sparse_ft.study.queue import Listener, Queue
from sparse_ft.study.worker import WorkerSetup
from sparse_ft.tracking.runs import Tracker

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "data_dir": "made", "lora_r": 2, "max_steps": 2, "batch_size": 2, "eval_limit": 4, "eval_batch_size": 4,
    "perplexity_tokens": 256, "perplexity_seq_len": 64, "calibration_samples": 8, "calibration_seq_len": 64,
}  # fmt: skip


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-mistral", "tiny-mixtral"])
@pytest.mark.parametrize("mode", ["sparse_to_sparse", "sparse_to_dense", "full", "dense"])
def test_cells_in_bfloat16_keep_their_promises(model, mode, tmp_path):
    bench = Workbench()
    cell = CellConfig(**{**SMALL, "model": model, "mode": mode, "importance": "wanda", "scope": "row", "keep": "all"})
    kind, masks = mask_set_of(cell), None
    if kind is not None:
        (masks,) = make_masks(replace(kind, sparsities=(0.5,)), bench, tmp_path / "masks")
    result = run_cell(cell, masks, bench, tmp_path / "cell")
    assert result.protocol["device"] == torch.cuda.get_device_name()
    assert result.protocol["dtype"] == "bfloat16"
    assert 0 < result.metrics["memory/peak_bytes"] < 1 << 30  # of the GPU's allocator, not of the process
    assert result.metrics["sparsity/violations"] == 0
    if mode in ("sparse_to_sparse", "full"):
        merged = Checkpoint(tmp_path / "cell" / "merged")
        assert result.metrics["sparsity/after_merge"] == masks.load().sparsity
        for name, mask in masks.load().items():
            assert not merged.tensor(name)[~mask].any()


def test_two_runs_of_a_cell_give_the_same_numbers(tmp_path):
    def numbers(folder):
        bench = Workbench()
        cell = CellConfig(**{**SMALL, "model": "tiny-llama", "max_steps": 6})
        (masks,) = make_masks(replace(mask_set_of(cell), sparsities=(0.5,)), bench, tmp_path / "masks")
        metrics = run_cell(cell, masks, bench, folder).metrics
        return {k: v for k, v in metrics.items() if k.startswith(("eval/", "train/loss")) and "second" not in k}

    assert numbers(tmp_path / "one") == numbers(tmp_path / "two")


def test_the_batch_is_not_multiplied_by_the_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)  # a second that would fail at the first touch
    result = run_cell(CellConfig(**SMALL, model="tiny-llama", mode="dense"), None, Workbench(), tmp_path)
    assert result.protocol["train_batch_size"] == 2
    assert [step for step, _ in result.series["train/loss_curve"]] == [1, 2]


def test_a_training_batch_that_does_not_fit_is_halved_and_the_step_stays_the_same(tmp_path, memory_limit):
    tracker = Tracker()
    parent = tracker.start("study", {"kind": "study"})
    executor = SerialExecutor(WorkerSetup(tracker.uri, parent, tmp_path / "untuned"), Listener())
    values = SMALL | {"max_steps": 1, "batch_size": 256, "max_seq_len": 256, "perplexity_tokens": 0, "dtype": "float32"}

    def run(name, **changed):
        cell = CellConfig(**values | changed, model="tiny-llama", mode="dense")
        queue = Queue([CellJob(cell, None, tmp_path / name, key=name)], 0)
        executor.run(queue)
        return queue.outcomes[-1]

    run("warm", batch_size=2)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    free = run("free")
    needed = torch.cuda.max_memory_reserved() - before
    memory_limit(before + needed * 7 // 10)
    tight = run("tight")
    assert tight.job.attempt == 2
    failed, again = [run for run in tracker.children(parent) if run.start_time][-2:]
    assert (failed.status, again.status) == ("FAILED", "FINISHED")
    assert failed.tags["failure_class"] == "out_of_memory"
    assert again.tags["reduced_batch"] == "256 -> 128"
    losses = [tracker.run(run_id).metrics["train/loss"] for run_id in (free.run_id, tight.run_id)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("executor", ["serial", "process"])
def test_a_study_and_a_model_made_again_to_the_bit(executor, tmp_path):
    file = tmp_path / "small.yaml"
    grid = {"model": ["tiny-llama"], "sparsity": [0.0, 0.5], "mode": ["sparse_to_dense", "sparse_to_sparse"]}
    file.write_text(json.dumps({"name": "small", "grid": grid, "cell": SMALL}))
    workers = None if executor == "serial" else 2  # two that share the one GPU
    assert sweep(SweepConfig(str(file), output_dir=str(tmp_path / "out"), executor=executor, max_workers=workers)) == 0
    tracker = Tracker()
    (study,) = [run for run in tracker.search() if run.tags.get("kind") == "study"]
    cells = [run for run in tracker.children(study.run_id) if run.tags.get("kind") == "cell"]
    assert [run.status for run in cells] == ["FINISHED"] * 5
    devices = {run.params.get("protocol/device") for run in cells if "same_as" not in run.tags}
    assert devices == {torch.cuda.get_device_name()}
    wanted = {"cfg/mode": "sparse_to_sparse", "cfg/sparsity": "0.5"}
    (chosen,) = [run for run in cells if wanted.items() <= run.params.items()]
    done = subprocess.run(
        [sys.executable, "-m", "entrypoints.rebuild", "--run_id", chosen.run_id, "--output_dir", tmp_path / "again"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_gpu_that_is_not_there_is_named_before_anything_runs(tmp_path):
    count = torch.cuda.device_count()
    done = subprocess.run(
        [sys.executable, "-m", "entrypoints.train", "--model", "tiny-llama", "--data_dir", "made"]
        + ["--device", f"cuda:{count}", "--output_dir", tmp_path / "x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"sees {count} CUDA" in done.stderr
    assert not (tmp_path / "x").exists()
    assert not Tracker().search()

"""Entry points in folders, stores and terminals that others have used before, or that are not what they seem."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from sparse_ft.tracking.runs import Tracker

ROOT = Path(__file__).resolve().parents[2]


def test_masks_made_twice_into_one_folder_are_logged_once_each(command, tmp_path):
    for method, level in (("unstructured", "0.5"), ("random", "0.25")):
        values = {"model": "tiny-llama", "method": method, "sparsities": level, "output_dir": tmp_path / "masks"}
        assert command("compute_masks", **values)[0] == 0
    first, second = (Tracker().artifacts(run.run_id) for run in Tracker().search())
    assert "masks/masks_sparsity50_unstructured.safetensors" in first
    assert "masks/masks_sparsity25_random.safetensors" in second
    assert not [name for name in second if "unstructured" in name]
    assert (tmp_path / "masks" / "masks_sparsity50_unstructured.safetensors").is_file()


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(
    "values", [{"experiment": "TYPO"}, {"experiment": ""}, {"experiment": "77"}, {"parent_run_id": "0" * 32}]
)
def test_analysing_what_is_not_there_creates_nothing(command, values, stored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if stored:
        Tracker(experiment="mine")
    else:
        (tmp_path / "mlflow.db").unlink()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    status, _, complaint = command("analyze", **values)
    assert (status, complaint.count("\n")) == (2, 1)
    assert complaint.startswith("analyze: there ")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    if stored:
        assert "Default, mine" in complaint or "no run" in complaint
        assert {item.name for item in MlflowClient().search_experiments()} == {"Default", "mine"}


def in_ascii(name, folder, **values):
    argv = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    return subprocess.run(
        [sys.executable, "-m", f"entrypoints.{name}", *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
        cwd=folder,
        capture_output=True,
        check=False,
    )


@pytest.mark.slow
def test_a_terminal_without_utf_8_ends_as_any_other(tmp_path):
    done = in_ascii("compute_masks", tmp_path, model="tiny-llama", output_dir="café")
    assert done.returncode == 0, done.stderr
    assert b"weights pruned, caf?/masks_sparsity50" in done.stdout
    done = in_ascii("train", tmp_path, model="./né")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1, done.stderr

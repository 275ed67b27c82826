"""A sparse model out of a study's registry: by alias, in a fresh process, bit for bit, and it validates."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.driver import sweep
from sparse_ft.tracking.models import resolve_model
from sparse_ft.tracking.runs import Tracker

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "models:/tiny-llama-boolq-sparse@sparse70"

# Knows mlflow and transformers, and nothing of sparse_ft.
FRESH = """
import sys, json, mlflow, torch
from safetensors.torch import load_file
uri, weights = sys.argv[1:]
model = mlflow.transformers.load_model(uri, return_type="components")["model"]
pyfunc = mlflow.pyfunc.load_model(uri)
served = pyfunc.get_raw_model().model
stored = load_file(weights)

def same(found):
    parts = dict(found.named_parameters())
    return set(stored) <= set(parts) and all(torch.equal(parts[name].cpu(), stored[name]) for name in stored)

print("REPORT", json.dumps({
    "transformers": same(model), "pyfunc": same(served), "zeros": sum(int((p == 0).sum()) for p in stored.values()),
    "answer": pyfunc.predict(["Question: is water wet?"])[0], "adapters": hasattr(model, "peft_config"),
}))
"""


pytestmark = pytest.mark.slow  # three fresh processes; a model that comes back by its alias is in tests/tracking too


@pytest.fixture(params=["sqlite", "server"])
def store(request, monkeypatch, tmp_path):
    """A sqlite file, or an mlflow server that hands out artifacts itself."""
    address = request.getfixturevalue("server") if request.param == "server" else f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return address


def test_a_registered_sparse_model_loads_by_alias_in_a_fresh_process_and_validates(store, study_file, tmp_path):
    grid = {"model": ["tiny-llama"], "sparsity": [0.7], "mode": ["sparse_to_sparse"]}
    path = study_file(grid, dense_baseline=False, register=True, cell={"learning_rate": 1e-2})
    assert sweep(SweepConfig(config=str(path), output_dir=str(tmp_path / "out"))) == 0
    tracker = Tracker()
    (parent,) = [run for run in tracker.search() if run.tags.get("kind") == "study"]
    (cell,) = [run for run in tracker.children(parent.run_id) if run.tags["kind"] == "cell"]
    assert cell.tags["registered_as"].startswith("tiny-llama-boolq-sparse/")

    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    folder = resolve_model(ADDRESS, folder=tmp_path / "fetched")
    argv = [sys.executable, "-c", FRESH, ADDRESS, str(folder / "model.safetensors")]
    fresh = subprocess.run(argv, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert fresh.returncode == 0, fresh.stderr[-3000:]
    (line,) = [line for line in fresh.stdout.splitlines() if line.startswith("REPORT")]
    report = json.loads(line.removeprefix("REPORT"))
    assert report["transformers"] and report["pyfunc"] and not report["adapters"]
    assert isinstance(report["answer"], str)

    (masks,) = (tmp_path / "out").glob("*/masks/*/masks_*.safetensors")
    validate = [sys.executable, "-m", "entrypoints.validate", "--checkpoint", ADDRESS, "--masks", str(masks)]
    proved = subprocess.run(validate, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert proved.returncode == 0, proved.stdout + proved.stderr
    assert " 0 violations" in proved.stdout

    version = tracker.client.get_model_version_by_alias("tiny-llama-boolq-sparse", "sparse70")
    assert {key: version.tags[key] for key in ("method", "mode", "sparsity", "mask_checksum")} == {
        "method": "unstructured",
        "mode": "sparse_to_sparse",
        "sparsity": "0.7",
        "mask_checksum": cell.tags["mask_checksum"],
    }
    assert float(version.tags["accuracy"]) == cell.metrics["eval/accuracy"]
    card = version.description
    for part in ("base_model: tiny-llama", "| after the merge |", "| method | unstructured |", "| num_fewshot |"):
        assert part in card
    assert f'load_model("{ADDRESS}"' in card

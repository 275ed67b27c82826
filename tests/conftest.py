"""What every test starts from: one thread, no hub, and no tracking store but its own."""

import os

# Before torch is imported: tests are many small runs, in which threads only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # documents.py, which takes the documentation apart (no test packages)


@pytest.fixture(autouse=True)
def _own_surroundings(monkeypatch, tmp_path):
    """No run to adopt, and a tracking store in the test's folder."""
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture(scope="session")
def tiny_model():
    """Folder of a built-in tiny model, by name."""
    from sparse_ft.models.catalog import locate

    return locate

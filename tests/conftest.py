"""What every test starts from: one thread, no hub, and no tracking store but its own."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

# Before torch is imported: tests are many small runs, in which threads only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Processes that a test starts take the threads that there are cores, beside those of the tests running with it: threads
# that wait for each other in a loop, as they do by default, then take ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

# Started in the background the tests ignore Ctrl-C, and so would the processes that they send one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).parent / "support"))  # what several tests need and that is no test

from servers import mlflow_server

# A study small enough for a test: a tiny model, made-up questions, two steps.
SMALL = {
    "data_dir": "made",
    "lora_r": 2,
    "max_steps": 2,
    "batch_size": 2,
    "eval_limit": 4,
    "eval_batch_size": 4,
    "perplexity_tokens": 256,
    "perplexity_seq_len": 64,
}


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with mlflow's tables and nothing in them, to copy: making them takes longer than most tests."""
    shared = tmp_path_factory.getbasetemp().parent  # by the processes of xdist
    path = shared / f"mlflow-{version('mlflow')}.db"
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            fresh = path.with_suffix(".new")
            fresh.unlink(missing_ok=True)
            upgrade = [sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{fresh}"]
            subprocess.run(upgrade, check=True, capture_output=True)
            fresh.rename(path)
    return path


@pytest.fixture
def made_store(empty_store: Path, tmp_path: Path) -> Path:
    """The tracking store of the test, with its tables; what tests that log take, folder by folder."""
    return shutil.copyfile(empty_store, tmp_path / "mlflow.db")


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


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[str]:
    """The address of a server with a store of its own, which hands out and takes artifacts itself."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copyfile(empty_store, folder / "mlflow.db")
    with mlflow_server(folder, f"sqlite:///{folder}/mlflow.db") as address:
        yield address


@pytest.fixture
def small():
    """Cell values under which a cell takes a second or two."""
    return dict(SMALL)


@pytest.fixture
def study_file(tmp_path):
    """Writes a study with the small cell values, which draws nothing unless asked; returns its path."""

    def write(grid, name="small", cell=None, **rest):
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            yaml.safe_dump({"name": name, "grid": grid, "cell": {**SMALL, **(cell or {})}, "figures": "none", **rest})
        )
        return path

    return write

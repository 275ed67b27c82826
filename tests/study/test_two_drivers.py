"""The same command typed twice in one moment, by two real processes, over a file and over a server."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from sparse_ft.tracking.runs import Tracker

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("store", ["sqlite", pytest.param("server", marks=pytest.mark.slow)])
def test_one_study_comes_of_it(store, study_file, tmp_path, request):
    uri = f"sqlite:///{tmp_path}/two.db" if store == "sqlite" else request.getfixturevalue("server")
    path = study_file({"model": ["tiny-llama"], "mode": ["dense", "sparse_to_sparse"]}, cell={"max_steps": 150})
    command = [sys.executable, "-m", "entrypoints.sweep", "--config", str(path), "--output_dir", str(tmp_path / "out")]
    environment = os.environ | {"MLFLOW_TRACKING_URI": uri, "MLFLOW_EXPERIMENT_NAME": f"two {store}"}
    options = {"cwd": ROOT, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **options) for _ in range(2)]
    said = [process.communicate(timeout=600)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    (line,) = [text.strip().splitlines()[-1] for text, process in zip(said, both, strict=True) if process.returncode]
    assert "is being run already (process" in line or "was taken over in this moment" in line
    assert "Traceback" not in "".join(said)
    tracker = Tracker(uri, f"two {store}")
    (study,) = [run for run in tracker.search() if run.tags.get("kind") == "study"]
    assert study.status == "FINISHED"
    cells = [run for run in tracker.children(study.run_id) if run.tags["kind"] == "cell"]
    assert Counter(run.tags["cell_key"] for run in cells if run.status == "FINISHED") == {
        run.tags["cell_key"]: 1 for run in cells
    }
    assert len(cells) == 2

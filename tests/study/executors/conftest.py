"""A parent run and jobs below it."""

import pytest

from sparse_ft.settings.cell import CellConfig
from sparse_ft.study.jobs import CellJob
from sparse_ft.study.worker import WorkerSetup
from sparse_ft.tracking.runs import Tracker


@pytest.fixture
def study(tmp_path, small):
    tracker = Tracker()
    parent = tracker.start("study", {"kind": "study"})
    setup = WorkerSetup(tracker.uri, parent, tmp_path / "untuned")

    def jobs(count, **values):
        cells = [
            CellConfig(**{"model": "tiny-llama", "mode": "dense", **small, "seed": n, **values}) for n in range(count)
        ]
        folder = tmp_path / "cells"
        return [CellJob(cell, None, folder / str(cell.seed), key=f"cell {cell.seed}") for cell in cells]

    return tracker, parent, setup, jobs

"""An empty store to copy, for the tests of what is kept in one."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_ft.tracking.runs import Tracker


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store to copy; making its tables takes longer than most tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        database = tmp_path_factory.mktemp("template") / "mlflow.db"
        Tracker(f"sqlite:///{database}", "template")
    return database

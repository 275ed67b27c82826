"""Tables that MLflow's pages show as such: browsable in a run's artifacts, and side by side under *Evaluation*."""

from __future__ import annotations

import json

import pandas as pd
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

from sparse_ft.tracking.runs import Tracker

__all__ = ["SUMMARY", "log_table"]

SUMMARY = "summary.json"  # of a study and of an analysis: their cells


def log_table(tracker: Tracker, run_id: str, table: pd.DataFrame, name: str) -> None:
    """Logs a table as mlflow's `log_table` does, in the place of one of the same name: mlflow's own puts the rows of a
    second analysis below those of the first.

    Args:
        tracker: where.
        run_id: whose.
        table: of numbers, texts and lists of them; its index is not logged, nor are columns in which nothing stands.
        name: of the artifact, with the ending ``.json``; it may have folders in it.
    """
    shown = table.dropna(axis=1, how="all")
    tracker.log_text(run_id, shown.to_json(orient="split", index=False, date_format="iso", force_ascii=False), name)
    known = json.loads(tracker.client.get_run(run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
    entry = {"path": name, "type": "table"}
    if entry not in known:
        tracker.log(run_id, tags={MLFLOW_LOGGED_ARTIFACTS: json.dumps([*known, entry])})

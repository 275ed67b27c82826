"""From the runs of a study to tables, figures and curve runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sparse_ft.analysis.write import AnalysisResult, write_analysis
from sparse_ft.progress import SILENT, Progress
from sparse_ft.study.config import AnalyzeConfig
from sparse_ft.tracking.runs import Tracker
from sparse_ft.tracking.stores import tracking_uri

__all__ = ["report_study", "study_rows", "ui_command", "write_curve_runs"]


def study_rows(tracker: Tracker, parent_run_id: str) -> list[dict[str, Any]]:
    """The runs of a study as the analysis reads them: times in milliseconds, as MLflow has them."""
    rows = tracker.children(parent_run_id)
    for row in rows:
        for key in ("start_time", "end_time"):
            row[key] = None if row[key] is None else row[key] * 1000
    return rows


def report_study(
    tracker: Tracker, parent_run_id: str, folder: Path, title: str = "", progress: Progress = SILENT
) -> AnalysisResult:
    """Writes tables and figures of a study into ``folder``, logs them to its run, and writes the curve runs."""
    result = write_analysis(study_rows(tracker, parent_run_id), folder, title, progress=progress)
    tracker.log_folder(parent_run_id, folder, "report")
    write_curve_runs(tracker, parent_run_id, result.curves)
    return result


def write_curve_runs(tracker: Tracker, parent_run_id: str, curves: list[dict[str, Any]]) -> None:
    """One run per curve, tagged ``kind=curve``, with step = sparsity in percent, so that MLflow's compare page
    draws sparsity curves. A curve that is there already stays; one that changed is written anew.
    """
    known = {
        row["tags"].get("curve_key"): row["run_id"]
        for row in tracker.children(parent_run_id)
        if row["tags"].get("kind") == "curve"
    }
    for curve in curves:
        run_id = known.get(curve["key"])
        if run_id is not None:
            written = {metric: tracker.curve(run_id, metric) for metric in curve["points"]}
            if written == curve["points"]:
                continue
            tracker.delete(run_id)
        identity = {k: v for k, v in curve.items() if k not in ("key", "name", "points")}
        run_id = tracker.start_child(parent_run_id, curve["name"], {"kind": "curve", "curve_key": curve["key"]})
        tracker.log(run_id, params={f"cfg/{name}": value for name, value in identity.items()}, curves=curve["points"])
        tracker.finish(run_id)


def ui_command(tracker: Tracker) -> str:
    """The command that shows the runs in a browser."""
    if os.environ.get("MLFLOW_TRACKING_URI") is None or tracker.uri == tracking_uri():
        return f"mlflow ui --backend-store-uri {tracker.uri}"
    return f"open {tracker.uri}"

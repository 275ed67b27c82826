"""From the runs of a study to tables, figures and curve runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sparse_ft.analysis.write import AnalysisResult, write_analysis
from sparse_ft.errors import masked
from sparse_ft.progress import SILENT, Progress
from sparse_ft.tracking.runs import Tracker

__all__ = ["in_milliseconds", "report_study", "study_console", "ui_command", "write_curve_runs"]


def in_milliseconds(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs with their times as the analysis reads them: in milliseconds, as MLflow has them."""
    times = ("start_time", "end_time")
    return [run | {key: run[key] and run[key] * 1000 for key in times} for run in runs]


def study_console() -> Console:
    """The console of a study's lines; rich gives a pipe 80 columns, too few for them."""
    console = Console()
    return console if console.is_terminal else Console(width=132)


def report_study(
    tracker: Tracker,
    parent_run_id: str,
    folder: Path,
    title: str = "",
    progress: Progress = SILENT,
    expected: Sequence[Mapping[str, Any]] | None = None,
) -> AnalysisResult:
    """Writes tables and figures of a study into ``folder``, logs them to its run, and writes the curve runs.

    ``expected`` are the plan's cells, so that those never run are named.
    """
    rows = in_milliseconds(tracker.children(parent_run_id))
    result = write_analysis(rows, folder, title=title, progress=progress, expected=expected)
    tracker.log_folder(parent_run_id, folder, "report")
    write_curve_runs(tracker, parent_run_id, result.curves)
    return result


def write_curve_runs(tracker: Tracker, parent_run_id: str | None, curves: list[dict[str, Any]]) -> None:
    """One run per curve, tagged ``kind=curve``, with step = sparsity in percent, so that MLflow's compare page
    draws sparsity curves. A curve that is there already stays; one that changed is written anew. Without a
    parent they stand in the tracker's experiment by themselves.
    """
    found = tracker.children(parent_run_id) if parent_run_id else tracker.search("tags.kind = 'curve'")
    known = {
        run["tags"]["curve_key"]: run["run_id"]
        for run in found
        if run["tags"].get("kind") == "curve" and run["parent_run_id"] == parent_run_id
    }
    for curve in curves:
        run_id = known.get(curve["key"])
        if run_id is not None:
            written = {metric: tracker.curve(run_id, metric) for metric in curve["points"]}
            if written == curve["points"]:
                continue
            tracker.delete(run_id)
        identity = {k: v for k, v in curve.items() if k not in ("key", "name", "points", "colour")}
        tags = {"kind": "curve", "curve_key": curve["key"], "mlflow.runColor": curve["colour"]}
        run_id = tracker.start_child(parent_run_id, curve["name"], tags)
        tracker.log(run_id, params={f"cfg/{name}": value for name, value in identity.items()}, curves=curve["points"])
        tracker.finish(run_id)


def ui_command(tracker: Tracker) -> str:
    """The command that shows the runs in a browser; an address with a password is left to the environment."""
    shown = masked(tracker.uri)
    if tracker.uri.startswith("http"):
        return f"open {shown}"
    return "mlflow ui --backend-store-uri " + (shown if shown == tracker.uri else '"$MLFLOW_TRACKING_URI"')

"""Sparsity curves as runs of their own, for MLflow's compare page."""

from __future__ import annotations

from typing import Any

from sparse_ft.tracking.record import Kind, Tag
from sparse_ft.tracking.runs import Tracker

__all__ = ["write_curve_runs"]


def write_curve_runs(tracker: Tracker, parent_run_id: str | None, curves: list[dict[str, Any]]) -> None:
    """One run per curve, tagged ``kind=curve``, with step = sparsity in percent, so that MLflow's compare page
    draws sparsity curves. A curve that is there already stays; one that changed is written anew. Without a
    parent they stand in the tracker's experiment by themselves.
    """
    found = tracker.children(parent_run_id) if parent_run_id else tracker.search(f"tags.{Tag.KIND} = '{Kind.CURVE}'")
    known = {
        run.tags[Tag.CURVE_KEY]: run.run_id
        for run in found
        if run.kind == Kind.CURVE and run.parent_run_id == parent_run_id
    }
    for curve in curves:
        run_id = known.get(curve["key"])
        if run_id is not None:
            written = {metric: tracker.curve(run_id, metric) for metric in curve["points"]}
            if written == curve["points"]:
                continue
            tracker.delete(run_id)
        identity = {k: v for k, v in curve.items() if k not in ("key", "name", "points", "colour")}
        tags = {Tag.KIND: Kind.CURVE, Tag.CURVE_KEY: curve["key"], Tag.COLOUR: curve["colour"]}
        run_id = tracker.start_child(parent_run_id, curve["name"], tags)
        tracker.log(run_id, params={f"cfg/{name}": value for name, value in identity.items()}, curves=curve["points"])
        tracker.finish(run_id)

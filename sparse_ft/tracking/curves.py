"""Sparsity curves as runs of their own, for MLflow's compare page."""

from __future__ import annotations

from typing import Any

from sparse_ft.tracking.notes import CURVES_NOTE
from sparse_ft.tracking.record import Kind, Run, Tag
from sparse_ft.tracking.runs import Tracker

__all__ = ["curve_experiment", "write_curve_runs"]


def curve_experiment(name: str) -> str:
    """The experiment of the curves of an experiment's studies: among the cells they would stand in every table."""
    return f"{name} curves"


def write_curve_runs(tracker: Tracker, parent_run_id: str | None, curves: list[dict[str, Any]]) -> None:
    """One run per curve, tagged ``kind=curve``, with step = sparsity in percent (or in tenths of it, where a level
    needs them: the tag ``steps`` says it), so that MLflow's compare page draws sparsity curves. A curve that is there
    already stays; one that changed is written anew. They stand in an experiment of their own, named after that of the
    study, or of the tracker where there is none.

    Those that an older version put among the cells are removed: they are written here anew.
    """
    home = tracker.experiment_id if parent_run_id is None else tracker.run(parent_run_id).experiment_id
    for run in _curves(tracker, home, parent_run_id):
        tracker.delete(run.run_id)
    if not curves:
        return
    place = tracker.beside(curve_experiment(tracker.client.get_experiment(home).name), CURVES_NOTE)
    known = {run.tags[Tag.CURVE_KEY]: run for run in _curves(tracker, place, parent_run_id)}
    for curve in curves:
        before = known.get(curve["key"])
        if before is not None:
            written = {metric: tracker.curve(before.run_id, metric) for metric in curve["points"]}
            if written == curve["points"] and before.tags.get(Tag.STEPS) == curve["steps"]:
                continue
            tracker.delete(before.run_id)
        identity = {k: v for k, v in curve.items() if k not in ("key", "name", "points", "colour", "steps")}
        tags = {Tag.KIND: Kind.CURVE, Tag.CURVE_KEY: curve["key"], Tag.COLOUR: curve["colour"]}
        tags |= {Tag.STEPS: curve["steps"], Tag.PARENT: parent_run_id}
        run_id = tracker.start_in(place, curve["name"], tags)
        tracker.log(run_id, params={f"cfg/{name}": value for name, value in identity.items()}, curves=curve["points"])
        tracker.finish(run_id)


def _curves(tracker: Tracker, experiment_id: str, parent_run_id: str | None) -> list[Run]:
    found = tracker.search(f"tags.{Tag.KIND} = '{Kind.CURVE}'", experiment_id)
    return [run for run in found if run.parent_run_id == parent_run_id]

"""MLflow's table of runs as it should open: an address with filter and columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from urllib.parse import urlsplit

from sparse_ft.tracking.record import Kind, Tag
from sparse_ft.tracking.runs import Tracker

__all__ = ["study_view"]

# What the page keeps under *Share*: the tag of the experiment whose name ends with the address' key.
_SHARED, _KEY = "mlflow.sharedViewState.", "viewStateShareKey"
_METRICS = ("eval/accuracy", "eval/perplexity", "eval/loss", "sparsity/achieved", "sparsity/violations")
_PARAMS = ("cfg/mode", "cfg/method", "cfg/importance", "cfg/sparsity")
_LOCAL = "http://127.0.0.1:5000"  # where `mlflow ui` answers


def study_view(tracker: Tracker, parent_run_id: str, columns: Sequence[str] = ()) -> str:
    """Saves how a study's cells are best looked at, and returns the address that opens it: its cells alone, sorted by
    accuracy, with the columns that answer the question.

    Args:
        tracker: where.
        parent_run_id: the study's run.
        columns: more parameters, such as ``cfg/task``, before the others.
    """
    experiment = tracker.run(parent_run_id).experiment_id
    shown = [f"params.`{name}`" for name in (*columns, *_PARAMS)] + [f"metrics.`{name}`" for name in _METRICS]
    shown += ["attributes.`Dataset`", f"tags.`{Tag.FAILURE_CLASS}`"]
    state = {
        "searchFilter": f"tags.`{Tag.PARENT}` = '{parent_run_id}' and tags.{Tag.KIND} = '{Kind.CELL}'",
        "orderByKey": "metrics.`eval/accuracy`",
        "orderByAsc": False,
        "selectedColumns": shown,
    }
    tracker.client.set_experiment_tag(experiment, f"{_SHARED}{parent_run_id}", json.dumps(state))
    server = _without_login(tracker.uri.rstrip("/")) if tracker.uri.startswith("http") else _LOCAL
    return f"{server}/#/experiments/{experiment}/runs?{_KEY}={parent_run_id}"


def _without_login(address: str) -> str:
    """A server's address without ``user:password@``: the browser asks for them, and the address is printed."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()

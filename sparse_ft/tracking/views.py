"""MLflow's table and charts of runs as they should open: an address with filter, columns and charts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from sparse_ft.tracking.record import Kind, Tag
from sparse_ft.tracking.runs import Tracker

__all__ = ["study_view"]

# What the page keeps under *Share*: the tag of the experiment whose name ends with the address' key.
_SHARED, _KEY = "mlflow.sharedViewState.", "viewStateShareKey"
_METRICS = ("eval/accuracy", "eval/perplexity", "eval/loss", "sparsity/achieved", "sparsity/violations")
_PARAMS = ("cfg/mode", "cfg/method", "cfg/importance", "cfg/sparsity")
# The charts that are open; those that MLflow makes of every metric stand below, by its first word, closed.
_AGAINST_SPARSITY = ("eval/perplexity", "eval/accuracy")
_LINES = ("train/loss_curve",)
_BARS = ("eval/perplexity", "eval/accuracy", "eval/loss")
_MADE_BY_MLFLOW = ("eval", "memory", "sparsity", "time", "train")
_LOCAL = "http://127.0.0.1:5000"  # where `mlflow ui` answers


def study_view(tracker: Tracker, parent_run_id: str, columns: Sequence[str] = ()) -> str:
    """Saves how a study's cells are best looked at, and returns the address that opens it: its cells alone, sorted by
    accuracy, with the columns and the charts that answer the question.

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
        "runsHiddenMode": "SHOW_ALL",
        "isAccordionReordered": True,  # else the sections are put in the order of their names
        "compareRunCharts": _charts("study"),
        "compareRunSections": [_section("study", "The study", made=False)]
        + [_section(name, name, made=True) for name in _MADE_BY_MLFLOW],
    }
    tracker.client.set_experiment_tag(experiment, f"{_SHARED}{parent_run_id}", json.dumps(state))
    server = _without_login(tracker.uri.rstrip("/")) if tracker.uri.startswith("http") else _LOCAL
    return f"{server}/#/experiments/{experiment}/runs?{_KEY}={parent_run_id}"


def _charts(section: str) -> list[dict[str, Any]]:
    """The charts of a section, as MLflow's page keeps them."""

    def chart(kind: str, name: str, how: Mapping[str, Any]) -> dict[str, Any]:
        return {"uuid": f"{kind} {name}", "type": kind, "metricSectionId": section, "runsCountToCompare": 20, **how}

    line = {"xAxisKey": "step", "yAxisKey": "metric", "lineSmoothness": 0, "scaleType": "linear", "range": {}}
    line |= {"xAxisScaleType": "linear", "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True}
    sparsity = {"key": "sparsity/achieved", "type": "METRIC"}
    return [
        *(chart("SCATTER", y, {"xaxis": sparsity, "yaxis": {"key": y, "type": "METRIC"}}) for y in _AGAINST_SPARSITY),
        *(chart("LINE", name, {"metricKey": name, **line}) for name in _LINES),
        *(chart("BAR", name, {"metricKey": name}) for name in _BARS),
    ]


def _section(uuid: str, name: str, made: bool) -> dict[str, Any]:
    """A section of the charts; one that MLflow makes by itself is closed."""
    return {"uuid": uuid, "name": name, "display": not made, "isReordered": False, "isGenerated": made}


def _without_login(address: str) -> str:
    """A server's address without ``user:password@``: the browser asks for them, and the address is printed."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()

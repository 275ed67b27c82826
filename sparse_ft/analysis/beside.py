"""Scores on tasks beside the one that was trained: a row a cell and task, and one for the mean, as if each had been the
cell's own. Whatever is made of cells (points, curves, heatmaps, sentences) is made of them too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from sparse_ft.analysis.baselines import compare_baseline
from sparse_ft.analysis.performance import performance_table
from sparse_ft.analysis.table import GROUP, MEAN, RESULTS, SCORED_AFTER, grouped_table, scored_names

__all__ = ["beside_cells", "beside_points", "compared_beside", "wide_points"]

_OF_TASK = ("accuracy_metric", "task_version", "num_fewshot", "split", "limit", "samples", "questions_sha256", "chance")
_OTHERS = ("split_rows", "n_scored", "majority", "training_split", "output_type", "source")  # of the cell's own task


def beside_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """A row for every cell and task that was scored beside its own, and for their mean.

    As of `sparse_ft.analysis.table.cell_table`, with ``accuracy`` and the protocol of that score; ``task`` is its name
    (with the trained one, where the study has several), ``scored`` the name alone and ``trained`` the cell's own task.
    """
    frames = []
    several = cells["task"].nunique() > 1
    for name in [MEAN, *scored_names(cells)]:
        prefix = "mean_accuracy" if name == MEAN else f"{name}/accuracy"
        measured = [f"{prefix}{after}" for after in SCORED_AFTER if f"{prefix}{after}" in cells]
        own = cells[cells[measured].notna().any(axis=1)] if measured else cells.iloc[:0]
        if own.empty:
            continue
        frame = own.assign(scored=name, trained=own["task"], warning=None)
        frame["task"] = [f"{name} after {task}" if several else name for task in own["task"]]
        kept = [column for column in RESULTS if column.startswith("sparsity_")]
        frame = frame.assign(**{column: math.nan for column in RESULTS if column not in kept})
        for after in SCORED_AFTER:
            for error in ("", "_stderr"):
                column = f"{prefix}{error}{after}"
                frame[f"accuracy{error}{after}"] = own.get(column, math.nan)
        frame = frame.assign(**{f"protocol_{column}": None for column in (*_OF_TASK, *_OTHERS)})
        said = own.get(f"protocol_score/{name}", pd.Series(None, index=own.index, dtype=object)).map(_parsed)
        for key in _OF_TASK:
            frame[f"protocol_{key}"] = [line.get(key) for line in said]
        frames.append(frame)
    if not frames:
        return cells.iloc[:0].assign(scored=None, trained=None)
    return pd.concat(frames, ignore_index=True)


def beside_points(beside: pd.DataFrame) -> pd.DataFrame:
    """Of the rows of `beside_cells`, what `performance_table` makes of cells, with ``scored`` and ``trained``."""
    points = performance_table(beside, grouped_table(beside))
    names = beside.drop_duplicates("task").set_index("task")
    for column in ("trained", "scored"):
        points.insert(2, column, points["task"].map(names[column]))
    return points


def wide_points(points: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Of the points of `beside_points` a row for each line and level, with columns ``NAME``, ``NAME error`` and
    ``NAME untuned``; and the names, the mean first."""
    names = [name for name in dict.fromkeys([MEAN, *sorted(points["scored"])]) if (points["scored"] == name).any()]
    keys = [name for name in GROUP if name != "task"] + ["trained"]
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for point in points.to_dict("records"):
        row = rows.setdefault(
            tuple(point[key] for key in keys), {key: point[key] for key in keys} | {"task": point["trained"]}
        )
        name = point["scored"]
        row |= {name: point["accuracy"], f"{name} error": point["accuracy_error"]}
        row |= {f"{name} untuned": point["accuracy_untuned"], f"{name} untuned error": point["accuracy_error_untuned"]}
    return pd.DataFrame(list(rows.values())), names


def compared_beside(
    published: pd.DataFrame, found: Mapping[str, pd.DataFrame], beside: pd.DataFrame
) -> dict[str, pd.DataFrame]:
    """What `compare_baseline` has found, and beside it the published accuracies of tasks that were scored."""
    if beside.empty:
        return dict(found)
    more = compare_baseline(published, beside, grouped_table(beside))
    keys = ["model", "task", "sparsity", "mode", "source", "protocol"]
    matched = set(more["joined"][keys].itertuples(index=False, name=None)) if len(more["joined"]) else set()
    rest = found["not_comparable"]
    left = [tuple(row[key] for key in keys) not in matched for row in rest.to_dict("records")]
    joined = [frame for frame in (found["joined"], more["joined"]) if len(frame)] or [found["joined"]]
    return {"joined": pd.concat(joined, ignore_index=True), "not_comparable": rest[left].reset_index(drop=True)}


def _parsed(line: Any) -> dict[str, str]:
    """``key=value; ...`` as the runs have it."""
    pairs = (part.partition("=") for part in line.split(";")) if isinstance(line, str) else ()
    return {key.strip(): value.strip() for key, equals, value in pairs if equals and value.strip() != "none"}

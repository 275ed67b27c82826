"""What the scores say: recovery of the dense fine-tuned accuracy, points of curves, Pareto fronts, sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from sparse_ft.analysis.alike import ways_of_points, why_not_comparable
from sparse_ft.analysis.style import COLOURS
from sparse_ft.analysis.table import GROUP, MEAN, grouped_table
from sparse_ft.levels import level_steps
from sparse_ft.settings.modes import DENSE, MODES, is_tuned

__all__ = ["CHANCE", "chance_level", "curves", "dense_baseline", "majority_level", "pareto_front", "performance_table"]

# Accuracy of a uniform guess among the answers the task offers; tasks that generate text have none.
CHANCE: Mapping[str, float] = {
    "boolq": 1 / 2, "hellaswag": 1 / 4, "piqa": 1 / 2, "winogrande": 1 / 2, "rte": 1 / 2, "copa": 1 / 2,
    "wic": 1 / 2, "openbookqa": 1 / 4, "mmlu": 1 / 4,
}  # fmt: skip

# (task, rows of the scored split) -> share of its commonest answer. BoolQ's validation split says yes 2,033
# times in 3,270 rows: a model that has only learnt to say yes looks well above chance.
MAJORITY: Mapping[tuple[str, str], float] = {("boolq", "3270"): 2033 / 3270}

POINT_MEASURES = (
    "accuracy", "accuracy_std", "accuracy_error", "recovery", "recovery_error", "acc_norm",
    "loss", "loss_std", "loss_error", "perplexity", "perplexity_std", "perplexity_error",
    "accuracy_untuned", "accuracy_error_untuned", "loss_untuned", "loss_error_untuned",
    "perplexity_untuned", "perplexity_error_untuned",
    "accuracy_recovered", "accuracy_error_recovered", "loss_recovered", "loss_error_recovered",
    "perplexity_recovered", "perplexity_error_recovered",
    "accuracy_remasked", "accuracy_error_remasked", "loss_remasked", "loss_error_remasked",
    "perplexity_remasked", "perplexity_error_remasked",
    "accuracy_gained", "accuracy_gained_error", "perplexity_ratio_gained", "perplexity_ratio_gained_error",
    "accuracy_remask_gap", "accuracy_remask_gap_error", "perplexity_ratio_remask", "perplexity_ratio_remask_error",
    "sparsity_achieved", "sparsity_after_merge", "train_tokens_per_second", "train_tokens_per_second_std",
    "train_samples_per_second", "eval_samples_per_second", "eval_samples_per_second_std", "peak_bytes",
    "measured_tokens_per_second", "measured_tokens_per_second_std", "measured_bytes",
)  # fmt: skip

CURVE_METRICS = {
    "eval/accuracy": "accuracy", "eval/acc_norm": "acc_norm", "eval/loss": "loss", "eval/perplexity": "perplexity",
    "eval/recovery": "recovery", "eval/accuracy_untuned": "accuracy_untuned",
    "eval/perplexity_untuned": "perplexity_untuned", "eval/accuracy_remasked": "accuracy_remasked",
    "eval/samples_per_second": "eval_samples_per_second", "train/tokens_per_second": "train_tokens_per_second",
    "sparsity/achieved": "sparsity_achieved", "sparsity/after_merge": "sparsity_after_merge",
    "memory/peak_bytes": "peak_bytes",
}  # fmt: skip


def chance_level(cells: pd.DataFrame, task: str) -> float | None:
    """Accuracy of guessing at ``task``: what the runs say (``protocol/chance``), else what its answers imply."""
    if "protocol_chance" in cells:
        said = pd.to_numeric(cells.loc[cells["task"] == task, "protocol_chance"], errors="coerce").dropna()
        if len(said):
            return float(said.iloc[0])
    return CHANCE.get(task)


def majority_level(cells: pd.DataFrame, task: str) -> float | None:
    """Accuracy of always giving the commonest answer: what the runs say (``protocol/majority``), else what a
    published split implies, recognised by its number of rows."""
    own = cells[cells["task"] == task]
    if "protocol_majority" in own:
        said = pd.to_numeric(own["protocol_majority"], errors="coerce").dropna()
        if len(said):
            return float(said.max())
    rows = own["protocol_split_rows"].dropna().unique() if "protocol_split_rows" in own else []
    return MAJORITY.get((task, str(rows[0]))) if len(rows) == 1 else None


def dense_baseline(
    grouped: pd.DataFrame, model: str, task: str, variant: str = "", tuned: bool = True
) -> pd.Series | None:
    """The point that recovery is measured against: dense fine-tuning, unpruned.

    A cell of mode ``dense``; where the study has none, a finished cell at 0 %, which is the same
    computation (all masks are ones). Of several variants the one asked for, else the only one there is.
    Of what is not fine-tuned (``tuned`` False) it is the dense model as it is: a cell of such a mode at 0 %.
    """
    same = grouped[(grouped["model"] == model) & (grouped["task"] == task) & grouped["accuracy"].notna()]
    same = same[same["mode"].map(is_tuned) == tuned]
    for found in (same[same["mode"] == DENSE.name], same[same["sparsity"] == 0]):
        exact = found[found["variant"] == variant]
        if len(exact):
            return exact.iloc[0]
        if len(found) and found["variant"].nunique() == 1:
            return found.iloc[0]
    return None


def performance_table(cells: pd.DataFrame, grouped: pd.DataFrame) -> pd.DataFrame:
    """One row a (line, level): scores beside recovery, what tuning gained and what re-masking costs.

    ``recovery``: accuracy over the dense fine-tuned accuracy of the same model and task (of what was not fine-tuned,
    over the dense model's), only where both were fine-tuned in the same way and scored under one protocol; where it is
    not known ``recovery_reason`` says why.
    ``accuracy_gained``: accuracy - accuracy_untuned.
    ``accuracy_remask_gap``: accuracy - accuracy_remasked, and likewise for perplexity as ratios (before /
    after, remasked / merged). ``X_error`` are standard errors that take both scores as independent (they
    share their questions, so the true error is rather smaller).
    """
    table = grouped.copy()
    for name in POINT_MEASURES:
        if name not in table:
            table[name] = math.nan
    table["recovery_reason"] = ""
    ways = ways_of_points(cells)
    bases: dict[tuple[Any, ...], pd.Series | None] = {}
    for index, row in zip(table.index, table.to_dict("records"), strict=True):
        panel = (row["model"], row["task"], row["variant"], is_tuned(row["mode"]))
        if panel not in bases:
            bases[panel] = dense_baseline(grouped, *panel)
        base = bases[panel]
        if reason := why_not_comparable(row, base, ways):
            table.at[index, "recovery_reason"] = reason
            continue
        ratio = row["accuracy"] / base["accuracy"]
        table.at[index, "recovery"] = ratio
        if not (row["mode"] == base["mode"] and row["sparsity"] == base["sparsity"]):
            parts = [row["accuracy_error"] / base["accuracy"], ratio * base["accuracy_error"] / base["accuracy"]]
            table.at[index, "recovery_error"] = math.hypot(*parts)
    table["accuracy_gained"] = table["accuracy"] - table["accuracy_untuned"]
    table["accuracy_gained_error"] = np.hypot(table["accuracy_error"], table["accuracy_error_untuned"])
    table["perplexity_ratio_gained"] = table["perplexity_untuned"] / table["perplexity"]
    table["perplexity_ratio_gained_error"] = table["perplexity_ratio_gained"] * _relative(table, "_untuned")
    table["accuracy_remask_gap"] = table["accuracy"] - table["accuracy_remasked"]
    table["accuracy_remask_gap_error"] = np.hypot(table["accuracy_error"], table["accuracy_error_remasked"])
    table["perplexity_ratio_remask"] = table["perplexity_remasked"] / table["perplexity"]
    table["perplexity_ratio_remask_error"] = table["perplexity_ratio_remask"] * _relative(table, "_remasked")
    table["sparsity_percent"] = (table["sparsity"] * 100).round(6)
    return table[[*GROUP, "sparsity_percent", "n", "seeds", *POINT_MEASURES, "recovery_reason"]]


def curves(
    cells: pd.DataFrame, table: pd.DataFrame | None = None, beside: pd.DataFrame | None = None
) -> list[dict[str, Any]]:
    """Curves for MLflow, one a (model, task, method, mode): mean over seeds against sparsity in percent.

    Each has ``key`` (stable across calls), ``name``, the identity fields, ``colour`` (of the line: MLflow knows
    no dashes, so every method and mode has its own), and ``points``: metric name ->
    sorted ``(step, value)`` with the step a whole number, as MLflow takes them: percent, or for all curves tenths of
    it, where a level needs them (``steps`` says which); values that are not finite or
    were not measured are left out, and so are lines of a single point. ``table``: the performance table,
    where it is at hand; ``beside``: the points of tasks scored beside (`sparse_ft.analysis.beside.beside_points`),
    which the curve has as ``eval/NAME/accuracy`` and ``eval/mean_accuracy``.
    """
    table = performance_table(cells, grouped_table(cells)) if table is None else table
    fields = [name for name in GROUP if name != "sparsity"]
    lines = table[["series", "variant", "mode"]].drop_duplicates().apply(tuple, axis=1).tolist() if len(table) else []
    result = []
    step, steps = level_steps(table["sparsity"].dropna())
    for key, group in table.groupby(fields, sort=False, dropna=False):
        curve: dict[str, Any] = dict(zip(fields, key, strict=True))
        if group["sparsity_percent"].nunique() < 2:
            continue
        points = {metric: _measured(group, column, step) for metric, column in CURVE_METRICS.items()}
        for name, own in _beside(beside, curve):
            metric = f"eval/{MEAN}_accuracy" if name == MEAN else f"eval/{name}/accuracy"
            points |= {f"{metric}{after}": _measured(own, f"accuracy{after}", step) for after in ("", "_untuned")}
        points = {metric: measured for metric, measured in points.items() if measured}
        line = f"{MODES[curve['mode']].short} {curve['series']}"
        parts = [line, *(curve[name] for name in ("task", "model", "variant") if curve[name])]
        if points:
            place = lines.index((curve["series"], curve["variant"], curve["mode"]))
            result.append(curve | {"key": "|".join(str(curve[f]) for f in fields), "name": " · ".join(parts),
                                   "colour": COLOURS[place % len(COLOURS)], "points": points,
                                   "steps": steps})  # fmt: skip
    return result


def _measured(line: pd.DataFrame, column: str, step: Callable[[float], int]) -> list[tuple[int, float]]:
    """(step, value) of a line, where both are numbers."""
    pairs = sorted(zip(line["sparsity"], line[column], strict=True))
    return [(step(float(level)), float(v)) for level, v in pairs if math.isfinite(v) and math.isfinite(level)]


def _beside(points: pd.DataFrame | None, curve: Mapping[str, Any]) -> Iterator[tuple[str, pd.DataFrame]]:
    """The lines of a curve's cells on the tasks scored beside, by their names."""
    if points is None or points.empty:
        return
    names = [name for name in GROUP if name not in ("task", "sparsity")]
    own = points[points["trained"] == curve["task"]]
    own = own[(own[names].astype(str) == [str(curve[name]) for name in names]).all(axis=1)]
    yield from own.groupby("scored", sort=True)


def pareto_front(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Indices of the points that no other one beats in both (more is better), by falling ``y``, rising ``x``."""
    order = np.lexsort((-x, -y))
    front, best = [], -math.inf
    for index in order:
        if x[index] > best:
            front.append(index)
            best = x[index]
    return np.array(front, dtype=int)


def _relative(table: pd.DataFrame, suffix: str) -> pd.Series:
    """Relative standard error of the ratio of two perplexities."""
    parts = [table[f"perplexity_error{end}"] / table[f"perplexity{end}"] for end in ("", suffix)]
    return np.hypot(*parts)

"""What is missing from a study and why, and under which protocol the rest was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

import pandas as pd

from sparse_ft.analysis.table import IDENTITY, NO_METHOD
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.field import named
from sparse_ft.settings.modes import DENSE
from sparse_ft.settings.rules import rule_label
from sparse_ft.tracking.parameters import text_of

__all__ = ["holes", "protocols"]

_LATER = named(CellConfig, later=True)
HOLE_COLUMNS = [*IDENTITY, "variant", "status", "reason", "message", "run_id"]


def holes(cells: pd.DataFrame, expected: Iterable[Mapping[str, Any]] | None = None) -> pd.DataFrame:
    """Cells without a result: failed, killed, running, finished without a score, or never started.

    ``reason`` is the failure class where the run names one. ``expected`` lists the cells of the plan
    (their whole configuration, or the identity columns; fewer are a pattern); without it every (method,
    importance, scope) is expected at each of its own levels and modes on every model, task and seed of the
    study, and what is absent is called ``not_run``.
    """
    records = []
    for cell in cells.to_dict("records"):
        reason, message = _reason(cell)
        if reason:
            known = {name: cell[name] for name in (*IDENTITY, "variant", "status", "run_id")}
            records.append(known | {"reason": reason, "message": message})
    wanted = list(expected) if expected is not None else _grid(cells)
    said = "in the plan" if expected is not None else "the other models, tasks or seeds have it"
    run = cells.to_dict("records")
    present = {_key(cell) for cell in run}
    told_apart = sorted({name for cell in wanted for name in cell if f"cfg_{name}" in cells or name in _LATER})

    def rest(cell: Mapping[str, Any], prefix: str) -> list[str]:
        values = [cell.get(f"{prefix}{name}") for name in told_apart]
        return [NO_METHOD if value is None or pd.isna(value) else text_of(value) for value in values]

    configured = {(_key(cell), *rest(cell, "cfg_")) for cell in run}
    for cell in wanted:
        # The cells of a plan differ in more than their identity. What stands in no key at its default they do not say.
        whole = len(cell) > len(IDENTITY) and {*told_apart} <= {*cell, *_LATER}
        if (_key(cell), *rest(cell, "")) not in configured if whole else not _is_present(cell, present):
            record = {name: cell.get(name) for name in IDENTITY} | {"importance": _rule(cell)}
            records.append(record | {"variant": "", "reason": "not_run", "message": f"no run: {said}"})
    return pd.DataFrame(records, columns=HOLE_COLUMNS)


def protocols(cells: pd.DataFrame) -> dict[str, Any]:
    """Under which conditions the numbers were measured, for ``protocol.json``.

    ``shared``: what holds for every cell that says it. ``by_task`` and ``by_model``: what is constant
    within a task or model but differs between them. ``varies``: all values of the rest.
    """
    columns = [str(c) for c in cells.columns if str(c).startswith("protocol_") and cells[c].notna().any()]
    result: dict[str, Any] = {"shared": {}, "by_task": {}, "by_model": {}, "varies": {}}
    for column in columns:
        name, values = column.removeprefix("protocol_"), _distinct(cells[column])
        if len(values) == 1:
            result["shared"][name] = values[0]
            continue
        for by in ("task", "model"):
            groups = {str(key): _distinct(group) for key, group in cells.groupby(by)[column]}
            if all(len(found) <= 1 for found in groups.values()):
                for key, found in groups.items():
                    if found:
                        result[f"by_{by}"].setdefault(key, {})[name] = found[0]
                break
        else:
            result["varies"][name] = values
    return result


def _distinct(column: pd.Series) -> list[Any]:
    return sorted(column.dropna().unique().tolist(), key=str)


def _reason(cell: Mapping[str, Any]) -> tuple[str, str]:
    status, message = cell["status"], cell["failure_message"] or ""
    if status != "FINISHED":
        names = {"KILLED": "killed", "RUNNING": "still_running", "SCHEDULED": "not_started"}
        return cell["failure_class"] or names.get(status, "unknown"), message
    if pd.isna(cell["accuracy"]):
        return "no_score", message or "finished, but no eval/accuracy was logged"
    return "", ""


def _key(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    def plain(name: str) -> Any:
        value = cell.get(name)
        if name == "sparsity":
            return None if value is None or pd.isna(value) else round(float(value), 9)
        if name == "seed":
            return None if value is None or pd.isna(value) else int(value)
        if name == "importance":
            value = _rule(cell)
        return value or NO_METHOD

    dense = cell.get("mode") == DENSE.name
    pruned = ("method", "importance", "scope")
    return tuple(
        0.0 if dense and n == "sparsity" else NO_METHOD if dense and n in pruned else plain(n) for n in IDENTITY
    )


def _rule(cell: Mapping[str, Any]) -> str | None:
    """The importance as the table has it, with what a plan says that follows it."""
    importance = cell.get("importance")
    return importance if importance is None else rule_label(importance, cell)


def _is_present(cell: Mapping[str, Any], present: set[tuple[Any, ...]]) -> bool:
    key = _key(cell)
    if key in present:
        return True
    given = [i for i, name in enumerate(IDENTITY) if cell.get(name) is not None or cell.get("mode") == DENSE.name]
    if len(given) == len(IDENTITY):
        return False
    return any(all(other[i] == key[i] for i in given if IDENTITY[i] != "seed" or cell.get("seed") is not None)
               for other in present)  # fmt: skip


def _grid(cells: pd.DataFrame) -> list[dict[str, Any]]:
    if cells.empty:
        return []
    models, tasks, seeds = (cells[name].drop_duplicates().tolist() for name in ("model", "task", "seed"))
    wanted = []
    for (method, importance, scope), group in cells.groupby(["method", "importance", "scope"], sort=False):
        levels, modes = sorted(group["sparsity"].dropna().unique()), group["mode"].drop_duplicates().tolist()
        for model, task, level, mode, seed in product(models, tasks, levels, modes, seeds):
            values = (model, task, method, importance, scope, float(level), mode, seed)
            wanted.append(dict(zip(IDENTITY, values, strict=True)))
    return wanted

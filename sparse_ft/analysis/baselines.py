"""Published numbers beside the study's own, joined only where they were measured alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd

from sparse_ft.analysis.table import GROUP
from sparse_ft.errors import UserError
from sparse_ft.settings.modes import MODES, is_tuned

__all__ = ["BASELINE_COLUMNS", "BUILT_IN", "compare_baseline", "load_baseline", "model_key"]

BASELINE_COLUMNS = (
    "model", "task", "method", "importance", "sparsity", "mode",
    "accuracy", "perplexity", "throughput", "source", "protocol",
)  # fmt: skip
BUILT_IN = ("shears", "wanda", "owl", "alps")
_MODES = (*MODES, "untuned")
_OPTIONAL = ("importance", "perplexity", "accuracy", "throughput")
_NUMBERS = ("sparsity", "accuracy", "perplexity", "throughput")
_MEASURES = ("accuracy", "perplexity", "throughput")
# What a published number has to state before it can be held against another. The throughput row depends
# on what it counts.
_STATED = {
    "accuracy": ("task_version", "num_fewshot", "split", "limit"),
    "perplexity": ("perplexity_corpus", "perplexity_seq_len", "perplexity_windows"),
}
_THROUGHPUTS = {
    "train_tokens_per_second": ("train_device", "train_dtype", "train_batch_size"),
    "train_samples_per_second": ("train_device", "train_dtype", "train_batch_size"),
    "eval_samples_per_second": ("device", "dtype", "batch_size"),
}
_JOINED = (
    "model", "task", "series", "sparsity", "mode", "measure", "published", "ours", "ours_error", "difference",
    "n", "source", "protocol",
)  # fmt: skip


def load_baseline(baseline: str | Path) -> pd.DataFrame:
    """A baseline file, or ``"builtin"``: the published tables that come with the package.

    Columns: model, task, method (``none`` for a dense model), sparsity (a fraction), mode (one of dense,
    untuned, sparse_to_dense, sparse_to_sparse, full), source, protocol, and at least one of accuracy (a
    fraction), perplexity and throughput; importance may be left out. ``protocol`` is ``key=value; ...``
    with the keys of ``protocol.json``; a throughput says what it counts
    (``throughput=train_tokens_per_second``).

    Raises:
        UserError: the file cannot be read, or the line that is wrong.
    """
    if str(baseline) == "builtin":
        folder = resources.files("sparse_ft.analysis") / "data"
        parts = [_read((folder / f"{name}.csv").read_text("utf-8"), f"{name}.csv") for name in BUILT_IN]
        return pd.concat(parts, ignore_index=True)
    path = Path(baseline).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the baseline {path}: {error}; give a CSV in UTF-8, builtin or none") from error
    return _read(text, str(path))


def compare_baseline(baseline: pd.DataFrame, cells: pd.DataFrame, grouped: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """``joined``: published and own number side by side, and ``not_comparable``: the rest, each with its reason.

    A number joins where model, task, method, importance (if given), sparsity and mode are the same and
    every key of the published protocol equals the study's; what a number depends on has to be stated.
    Perplexity does not depend on the task, mode ``untuned`` is the pruned model before or without fine-tuning.
    """
    conditions = _conditions(cells)
    points = [_with_untuned(point) for point in grouped.to_dict("records")]
    joined: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for row in baseline.to_dict("records"):
        for measure in _MEASURES:
            if not math.isnan(row[measure]):
                found, reason = _match(row, measure, points, conditions)
                joined += found
                if not found:
                    rest.append({name: row[name] for name in BASELINE_COLUMNS if name not in _MEASURES}
                                | {"measure": measure, "published": row[measure], "reason": reason})  # fmt: skip
    columns = [*(name for name in BASELINE_COLUMNS if name not in _MEASURES), "measure", "published", "reason"]
    return {
        "joined": pd.DataFrame(joined, columns=list(_JOINED)),
        "not_comparable": pd.DataFrame(rest, columns=columns),
    }


def _with_untuned(point: dict[str, Any]) -> dict[str, Any]:
    """A point whose mode trains nothing has its scores as those of the untuned model too."""
    if is_tuned(point["mode"]):
        return point
    kinds = ("", "_error")
    names = [(f"{name}{kind}", f"{name}{kind}_untuned") for name in ("accuracy", "perplexity") for kind in kinds]
    return point | {untuned: point[name] for name, untuned in names if name in point}


def model_key(name: str) -> str:
    """What a model is called, without hub organisation, folder, case and the ``-hf`` of converted checkpoints."""
    key = str(name).rstrip("/").rsplit("/", 1)[-1].lower().replace("_", "-").removesuffix("-hf")
    return key.replace("llama2", "llama-2").replace("llama3", "llama-3")


def _read(text: str, where: str) -> pd.DataFrame:
    try:
        table = pd.read_csv(StringIO(text), dtype=str, keep_default_na=False, skipinitialspace=True)
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(f"{where} is no CSV table: {error}") from error
    table.columns = [str(name).strip() for name in table.columns]
    missing = [name for name in BASELINE_COLUMNS if name not in table and name not in _OPTIONAL]
    if missing:
        raise UserError(f"{where} lacks the columns {', '.join(missing)}; expected {', '.join(BASELINE_COLUMNS)}")
    for name in _OPTIONAL:
        if name not in table:
            table[name] = ""
    for index, row in table.iterrows():
        problem = _problem(row)
        if problem:
            raise UserError(f"{where}, line {int(index) + 2}: {problem}")  # type: ignore[call-overload]
    for name in _NUMBERS:
        table[name] = pd.to_numeric(table[name].replace("", None)).astype(float)
    return table[list(BASELINE_COLUMNS)]


def _problem(row: pd.Series) -> str:
    for name in ("model", "task", "method", "mode", "source", "protocol"):
        if not row[name].strip():
            return f"{name} is empty"
    if row["mode"] not in _MODES:
        return f"mode is {row['mode']}; it must be one of {', '.join(_MODES)}"
    for name in _NUMBERS:
        value = row[name].strip()
        try:
            number = float(value) if value else math.nan
        except ValueError:
            return f"{name} is {value}; it must be a number"
        if name in ("sparsity", "accuracy") and not math.isnan(number) and not 0 <= number <= 1:
            return f"{name} is {value}; it must be a fraction between 0 and 1"
        if name == "sparsity" and math.isnan(number):
            return "sparsity is empty"
    if not any(row[name].strip() for name in _MEASURES):
        return "it gives none of accuracy, perplexity and throughput"
    if any("=" not in part for part in row["protocol"].split(";") if part.strip()):
        return f"protocol is {row['protocol']}; it must be key=value; key=value"
    return ""


def _match(
    row: Mapping[str, Any],
    measure: str,
    points: Sequence[Mapping[str, Any]],
    conditions: Mapping[tuple[Any, ...], Mapping[str, set[str]]],
) -> tuple[list[dict[str, Any]], str]:
    tests = (
        (lambda p: model_key(p["model"]) == model_key(row["model"]), "no cell of this model"),
        (lambda p: measure == "perplexity" or p["task"] == row["task"], "this model has no cell of this task"),
        (lambda p: _same_method(row, p), "no cell with this method"),
        (lambda p: abs(p["sparsity"] - row["sparsity"]) < 1e-6, "no cell at this sparsity"),
        (lambda p: row["mode"] in ("untuned", p["mode"]), "no cell in this mode"),
    )
    left: Sequence[Mapping[str, Any]] = points
    for test, reason in tests:
        left = [point for point in left if test(point)]
        if not left:
            return [], reason
    protocol = _parsed(row["protocol"])
    unstated, column = _column(row, measure, protocol)
    if unstated:
        return [], unstated
    left = [point for point in left if not math.isnan(point.get(column, math.nan))]
    if not left:
        return [], f"{column} was not measured"
    found, reasons = [], []
    for point in left:
        differing = _differences(protocol, conditions[tuple(point[name] for name in GROUP)])
        if differing:
            reasons.append(differing)
        else:
            found.append(_side_by_side(row, measure, column, point))
    return found, "; ".join(dict.fromkeys(reasons))


def _column(row: Mapping[str, Any], measure: str, protocol: Mapping[str, str]) -> tuple[str, str]:
    """``(what is missing from the published protocol, our column)``."""
    if measure == "throughput":
        column = protocol.get("throughput", "")
        if column not in _THROUGHPUTS:
            return f"its protocol does not say what throughput counts ({', '.join(_THROUGHPUTS)})", ""
        needed: Sequence[str] = _THROUGHPUTS[column]
    else:
        column, needed = measure + ("_untuned" if row["mode"] == "untuned" else ""), _STATED[measure]
    silent = [key for key in needed if key not in protocol]
    return (f"its protocol does not state {', '.join(silent)}" if silent else ""), column


def _differences(protocol: Mapping[str, str], ours: Mapping[str, set[str]]) -> str:
    parts = []
    for key, value in protocol.items():
        if key == "throughput":
            continue
        said = ours.get(key, set())
        if len(said) != 1:
            parts.append(f"{key} is {value}, here {'mixed' if said else 'not stated'}")
        elif not _equal(value, next(iter(said))):
            parts.append(f"{key} is {value}, here {next(iter(said))}")
    return "protocol differs: " + ", ".join(parts) if parts else ""


def _equal(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return one.strip().lower() == other.strip().lower()


def _same_method(row: Mapping[str, Any], point: Mapping[str, Any]) -> bool:
    if row["sparsity"] == 0:  # nothing is pruned, whatever the method is called
        return True
    return point["method"] == row["method"] and (row["importance"] or point["importance"]) == point["importance"]


def _side_by_side(row: Mapping[str, Any], measure: str, column: str, point: Mapping[str, Any]) -> dict[str, Any]:
    error = point.get(f"{measure}_error{'_untuned' if row['mode'] == 'untuned' else ''}", math.nan)
    return {
        "model": point["model"],
        "task": point["task"],
        "series": point["series"],
        "sparsity": point["sparsity"],
        "mode": row["mode"],
        "measure": column,
        "published": row[measure],
        "ours": point[column],
        "ours_error": error,
        "difference": point[column] - row[measure],
        "n": point["n"],
        "source": row["source"],
        "protocol": row["protocol"],
    }


def _conditions(cells: pd.DataFrame) -> dict[tuple[Any, ...], dict[str, set[str]]]:
    """For every point the values its finished cells state for each protocol key (and its pattern and allocation)."""
    columns = {str(c): str(c).removeprefix("protocol_") for c in cells.columns if str(c).startswith("protocol_")}
    columns |= {f"cfg_{key}": key for key in ("pattern", "allocation") if f"cfg_{key}" in cells}
    found: dict[tuple[Any, ...], dict[str, set[str]]] = {}
    for cell in cells[cells["status"] == "FINISHED"].to_dict("records"):
        stated = found.setdefault(tuple(cell[name] for name in GROUP), {})
        for column, key in columns.items():
            # MLflow keeps the limit of "all questions" as the text None, which the table shows as missing.
            value = "none" if cell[column] is None and key == "limit" else cell[column]
            if value is not None:
                stated.setdefault(key, set()).add(str(value))
    return found


def _parsed(protocol: str) -> dict[str, str]:
    pairs = (part.split("=", 1) for part in protocol.split(";") if part.strip())
    return {key.strip(): value.strip() for key, value in pairs}

"""From run records to one tidy row a cell, and to one row a point of a curve."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pandas as pd

from sparse_ft.errors import UserError
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.field import named
from sparse_ft.settings.modes import DENSE, is_tuned
from sparse_ft.settings.rules import METHODS, STEPS, rule_label
from sparse_ft.tracking.record import Kind, Run, Tag

__all__ = [
    "EVALUATION_PROTOCOL",
    "GROUP",
    "IDENTITY",
    "MEAN",
    "MEASURES",
    "NO_METHOD",
    "RESULTS",
    "SCORED_AFTER",
    "cell_table",
    "grouped_table",
    "row_label",
    "scored_names",
    "series_label",
]

NO_METHOD = "none"  # the method of a cell that prunes nothing
IDENTITY = ("model", "task", "method", "importance", "scope", "sparsity", "mode", "seed")
GROUP = ("model", "task", "method", "importance", "scope", "series", "variant", "mode", "sparsity")
RESULTS = (
    "sparsity_target", "sparsity_achieved", "sparsity_after_merge", "sparsity_violations",
    "accuracy", "accuracy_stderr", "acc_norm", "loss", "loss_stderr", "perplexity", "perplexity_stderr",
    "accuracy_untuned", "accuracy_stderr_untuned", "loss_untuned", "loss_stderr_untuned",
    "perplexity_untuned", "perplexity_stderr_untuned",
    "accuracy_recovered", "accuracy_stderr_recovered", "loss_recovered", "loss_stderr_recovered",
    "perplexity_recovered", "perplexity_stderr_recovered",
    "accuracy_remasked", "accuracy_stderr_remasked", "loss_remasked", "loss_stderr_remasked",
    "perplexity_remasked", "perplexity_stderr_remasked",
    "train_loss", "train_tokens_per_second", "train_samples_per_second", "eval_samples_per_second",
    "measured_tokens_per_second", "measured_bytes", "peak_bytes", "minutes",
)  # fmt: skip
# Columns of the tags' own names.
TAGS = tuple(
    str(tag) for tag in (Tag.FAILURE_CLASS, Tag.FAILURE_MESSAGE, Tag.SAME_AS, Tag.MASK_CHECKSUM, Tag.CELL_KEY,
                         Tag.REDUCED_BATCH, Tag.WARNING)
)  # fmt: skip
# Averaged over seeds by grouped_table.
MEASURES = tuple(name for name in RESULTS if "stderr" not in name)
# When a model was scored, as its scores' columns end: tuned, before tuning, after recovery, re-masked.
SCORED_AFTER = ("", "_untuned", "_recovered", "_remasked")
# Scores that come with a standard error, each as it was measured.
ERRORS = tuple((name, suffix) for name in ("accuracy", "loss", "perplexity") for suffix in SCORED_AFTER)
MEAN = "mean"  # of the tasks that were scored beside the cell's own: the column mean_accuracy
# Two scores are the same measurement only if all of these agree.
EVALUATION_PROTOCOL = (
    "task_version", "num_fewshot", "limit", "split", "split_rows", "samples", "n_scored", "questions_sha256",
    "accuracy_metric", "fewshot_seed", "chat_template", "lm_eval_version",
    "perplexity_corpus", "perplexity_seq_len", "perplexity_tokens",
)  # fmt: skip
# Metrics that are no columns: of the machine and of the masks' making; and of curves whose last point says nothing.
_NOT_THE_CELLS, _ONLY_CURVES = ("system/", "prune/"), ("/learning_rate", "/grad_norm", "/tokens_per_second_curve")
# Parameters of runs that no result depends on.
_INCIDENTAL = named(CellConfig, result=False)
# Names that say nothing where a run says what was behind them (``identity/...``).
_BEHIND = {entry.name: entry.metadata["behind"] for entry in fields(CellConfig) if entry.metadata["behind"]}


def cell_table(runs: Iterable[Run]) -> pd.DataFrame:
    """One row a cell; runs that are no cells are left out.

    Cells are the runs tagged ``kind=cell``, without those ``superseded`` by a later start of their study. Of
    several attempts at a cell (equal configuration, and equal weights, rows, precision and code behind it) the
    finished one counts, else the latest. Sparsities are fractions, accuracies
    fractions, losses nats, ``minutes`` the run's wall time, ``peak_bytes`` bytes. What a run did not
    measure is NaN. A run tagged ``same_as`` that carries no result of its own shows the scores of the run
    it names: the same computation under another name, so its times stay empty. Of tasks that were scored beside the
    cell's own there are ``NAME/accuracy`` and what else lm-eval measured, and ``mean_accuracy``. ``series`` is the
    label of a line in a figure, ``variant`` what else tells cells of equal identity apart: whatever the study varied,
    and whatever differs in weights, rows, precision, masks, code or protocol.
    """
    cells = [run for run in runs if run.kind == Kind.CELL and not run.is_superseded]
    records = _resolve_same([_record(run) for run in _latest(cells)])
    names = dict.fromkeys([*IDENTITY, *RESULTS, *TAGS, "status", "run_id", "parent_run_id", "name"])
    names |= dict.fromkeys(name for record in records for name in record)
    # Column by column into one frame: a run has over a hundred of them.
    table = pd.DataFrame({name: _column(name, records) for name in names})
    table = pd.concat([table, _series(table).rename("series"), _variants(table).rename("variant")], axis=1)
    first = [*IDENTITY[:5], "series", "variant", *IDENTITY[5:], "status", *RESULTS, *TAGS]
    last = ["run_id", "parent_run_id", "name"]
    rest = sorted(str(c) for c in table.columns if c not in first and c not in last)
    return _sorted(table[[*first, *rest, *last]])


def grouped_table(cells: pd.DataFrame) -> pd.DataFrame:
    """One row a point of a curve: mean and standard deviation over the finished cells that differ in seed only.

    ``n`` counts the cells; ``X_std`` is the sample deviation (NaN for one cell). ``X_error`` of accuracy, loss
    and perplexity is one standard error: of the questions scored or windows read, and where there are several
    seeds also of the mean over them (the seeds share the questions, so the first part does not shrink with
    their number).

    Raises:
        UserError: two results of one seed at one point, which nothing that was logged tells apart.
    """
    done = cells[cells["status"] == "FINISHED"]
    _check_seeds(done)
    names = [name for name in MEASURES if name in cells and done[name].notna().any()]
    columns = [*GROUP, "n", "seeds"]
    for name in names:
        columns += [name, f"{name}_std"]
    records = []
    for key, group in done.groupby(list(GROUP), dropna=False, sort=False):
        record = dict(zip(GROUP, key, strict=True))
        record |= {"n": len(group), "seeds": group["seed"].nunique()}
        for name in names:
            record[name], record[f"{name}_std"] = _mean_and_deviation(group[name].dropna().tolist())
        for name, suffix in ERRORS:
            record[f"{name}_error{suffix}"] = _error(group, name, suffix)
        records.append(record)
    columns += [f"{name}_error{suffix}" for name, suffix in ERRORS]
    return _sorted(pd.DataFrame(records, columns=columns))


def scored_names(cells: pd.DataFrame) -> list[str]:
    """The tasks that were scored beside the cells' own: the columns ``NAME/accuracy``, and those of other stages."""
    ends = {f"accuracy{after}" for after in SCORED_AFTER}
    parts = (str(column).rpartition("/") for column in cells.columns if not str(column).startswith("protocol_"))
    return sorted({name for name, _, end in parts if name and end in ends})


def row_label(row: Mapping[str, Any]) -> str:
    """What stands for a cell or point in a table: its line's label, and of what is neither pruned nor tuned that it is
    the dense model, though it may be the first point of a rule's line. A cell that is only recorded there (``same_as``)
    has its line's."""
    unpruned = row["sparsity"] == 0 and not is_tuned(row["mode"]) and _missing(row.get("same_as"))
    return DENSE.label if unpruned else row["series"]


def series_label(method: str, importance: str | None) -> str:
    """Name of a line: the method, its importance where it has one (random pruning does not), and what follows it."""
    if method == NO_METHOD:
        return DENSE.label
    chosen, plus, steps = (importance or NO_METHOD).partition("+")
    return (method if method == "random" or chosen == NO_METHOD else f"{method} {chosen}") + plus + steps


def _latest(runs: Sequence[Run]) -> list[Run]:
    """Of the attempts at a cell the finished one, else the latest.

    Two finished runs are attempts at one cell only where their keys agree too. An attempt that ended before it knew
    what was behind its names gives way to any that came further.
    """
    attempts: dict[Any, list[Run]] = {}
    for run in runs:
        attempts.setdefault(_configuration(run), []).append(run)
    latest = []
    for same in attempts.values():
        behind: dict[Any, list[Run]] = {}
        for run in same:
            behind.setdefault(_parameters(run, "identity/"), []).append(run)
        if len(behind) > 1:
            behind.pop((), None)
        for alike in behind.values():
            done = [run for run in alike if run.is_finished]
            for key in dict.fromkeys(run.cell_key for run in done) or [""]:
                latest.append(max([run for run in done if run.cell_key == key] or alike, key=_rank))
    return latest


def _rank(run: Run) -> tuple[bool, bool, float]:
    # An identical run recorded under another name must not hide the run that measured.
    return run.is_finished, bool(run.metrics), run.start_time


def _configuration(run: Run) -> tuple[tuple[str, str], ...]:
    return tuple(pair for pair in _parameters(run, "cfg/") if pair[0][4:] not in _INCIDENTAL)


def _parameters(run: Run, prefix: str) -> tuple[tuple[str, str], ...]:
    return tuple(pair for pair in sorted(run.params.items()) if pair[0].startswith(prefix))


def _check_seeds(done: pd.DataFrame) -> None:
    """Refuses to average what is no set of seeds. The same computation under another name is no second result."""
    measured = done[done["same_as"].isna()] if "same_as" in done else done
    doubled = measured[measured.duplicated([*GROUP, "seed"], keep=False)]
    if len(doubled):
        first = doubled.iloc[0]
        same = doubled[(doubled[[*GROUP, "seed"]].astype(str) == first[[*GROUP, "seed"]].astype(str)).all(axis=1)]
        what = (
            f"{first['mode']} {first['series']} at {100 * first['sparsity']:g} %, {first['task']} on {first['model']}"
        )
        raise UserError(
            f"the runs {' and '.join(same['run_id'].astype(str))} are two results of one seed ({first['seed']}) at one "
            f"point ({what}), and nothing that they logged tells them apart. Analyse one study (parent_run_id), or "
            "delete the run that is wrong."
        )


def _record(run: Run) -> dict[str, Any]:
    params = run.params
    record: dict[str, Any] = {name: _value(params.get(f"cfg/{name}")) for name in IDENTITY}
    record["sparsity"] = _number(params.get("cfg/sparsity"))
    record["seed"] = _whole(params.get("cfg/seed"))
    if record["mode"] == DENSE.name:  # nothing is pruned, whatever the study's defaults were
        record |= {"method": NO_METHOD, "importance": NO_METHOD, "scope": NO_METHOD, "sparsity": 0.0}
    for name in ("method", "importance", "scope"):
        record[name] = record[name] or NO_METHOD
    steps = {step: _value(params.get(f"cfg/{step}")) for step in STEPS}
    record["importance"] = rule_label(record["importance"], steps)
    for key, value in params.items():
        group, _, name = key.partition("/")
        if group in ("cfg", "protocol", "identity") and not (group == "cfg" and name in (*IDENTITY, *STEPS)):
            # A task's name is kept as it is: protocol_score/piqa.
            record[f"{group}_{name if name.startswith('score') else name.replace('/', '_')}"] = _value(value)
    for key, value in run.metrics.items():
        if not (key.startswith(_NOT_THE_CELLS) or key.endswith(_ONLY_CURVES)):
            record[_metric_name(key)] = _number(value)
    record["measured_tokens_per_second"] = max(_measured(run, "/decoding_tokens_per_second_batch_8"), default=math.nan)
    record["measured_bytes"] = min(_measured(run, "/disk_bytes"), default=math.nan)
    # A store's times are whole milliseconds; the difference of two in seconds has lost digits.
    record["minutes"] = math.nan if run.seconds is None else round(1000 * run.seconds) / 60_000
    record |= {name: run.tags.get(name) for name in TAGS}
    for name in ("status", "run_id", "parent_run_id", "name"):
        record[name] = getattr(run, name)
    if "no_weight_moved: " in (record["warning"] or ""):
        _not_tuned(record)
    return record


def _measured(run: Run, what: str) -> list[float]:
    """A number of every form of the cell's model that was measured (``measure/FORM/...``)."""
    names = (name for name in run.metrics if name.startswith("measure/") and name.endswith(what))
    return [value for name in names if not math.isnan(value := _number(run.metrics[name]))]


def _not_tuned(record: dict[str, Any]) -> None:
    """Takes the scores of a tuned model from a cell whose training moved no weight: they are the untuned one's."""
    record.pop("acc_norm", None)
    own = [f"{score}{error}" for score in ("accuracy", "loss", "perplexity") for error in ("", "_stderr")]
    for name in own + [name for name in record if _is_beside(name) and not name.endswith(SCORED_AFTER[1:])]:
        value = record.pop(name, math.nan)
        record.pop(f"{name}_remasked", None)
        if _missing(record.get(f"{name}_untuned")):
            record[f"{name}_untuned"] = value


def _metric_name(key: str) -> str:
    group, _, name = key.partition("/")
    if group == "eval" and not name.startswith(("samples_per", "tokens_per")):
        return name
    if group in ("memory", "time"):
        return name
    return key.replace("/", "_")


def _resolve_same(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_id = {record["run_id"]: record for record in records}
    for record in records:
        twin = by_id.get(record["same_as"])
        measured = (name for name in RESULTS if name != "minutes")
        if twin is None or twin is record or any(not _missing(record.get(name)) for name in measured):
            continue
        for name, value in twin.items():
            copied = name in RESULTS or name.startswith("protocol_") or _is_beside(name)
            if copied and name != "minutes" and _missing(record.get(name)):
                record[name] = value
        record["minutes"] = math.nan
        record["warning"] = record["warning"] or twin["warning"]
    return records


def _column(name: str, records: Sequence[Mapping[str, Any]]) -> pd.Series:
    values = [record.get(name) for record in records]
    if name in RESULTS or name == "sparsity" or name.endswith("_seconds") or _is_beside(name):
        return pd.Series([_number(value) for value in values], dtype=float)
    return pd.Series([None if _missing(value) else value for value in values], dtype=object)


def _is_beside(name: str) -> bool:
    """Whether a column is a score of a task beside the cell's own, or of their mean."""
    return name.startswith("mean_accuracy") or ("/" in name and not name.startswith("protocol_"))


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _value(text: Any) -> str | None:
    return None if text is None or str(text) in ("", "None", "null") else str(text)


def _number(value: Any) -> float:
    """NaN, not measured, for an infinity as well, and for the largest float: mlflow keeps that for one in sqlite."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return math.nan
    return number if abs(number) < sys.float_info.max else math.nan


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if math.isnan(number) else int(number)


def _series(table: pd.DataFrame) -> pd.Series:
    """Label of the line a cell belongs to: the scope is named only where a method comes with several. What is neither
    pruned nor tuned belongs to its rule's line where that has other levels, and is else the dense model itself."""
    if table.empty:
        return pd.Series(dtype=object)
    scopes = table.groupby(["method", "importance"])["scope"].transform("nunique")
    labels = [series_label(m, i) for m, i in zip(table["method"], table["importance"], strict=True)]
    named = [
        f"{label} {scope}" if n > 1 else label for label, scope, n in zip(labels, table["scope"], scopes, strict=True)
    ]
    alone = table.groupby(["model", "task", "method", "importance", "scope"])["sparsity"].transform("max") == 0
    dense = alone & ~table["mode"].map(is_tuned)
    return pd.Series(named, index=table.index, dtype=object).mask(dense, DENSE.label)


def _variants(table: pd.DataFrame) -> pd.Series:
    """What tells apart the cells of one point and one seed: ``"lora_r=8, limit=100"``, or ``""``."""
    if table.empty:
        return pd.Series(dtype=object)
    watched = [c for c in map(str, table.columns) if c.startswith("cfg_") and not _says_nothing(table, c[4:])]
    watched += [c for c in map(str, table.columns) if c.startswith("identity_")]
    watched += [f"protocol_{name}" for name in EVALUATION_PROTOCOL if f"protocol_{name}" in table]
    watched += [c for c in map(str, table.columns) if c.startswith("protocol_score/")]
    point = [name for name in IDENTITY if name != "seed"]
    # A cell without a result has not said how it was measured: what it lacks is no difference.
    done = table[table["status"] == "FINISHED"]
    results = done if len(done) else table
    varied = (table.groupby(point, dropna=False)[watched].nunique() > 1).any()
    lacking = (results.groupby(point)[watched].nunique(dropna=False) > 1).any() & ~varied
    many = [c for found in (varied, lacking) for c in watched if found[c]]
    texts = []
    for _, row in table[many].iterrows():
        parts = [f"{str(c).split('_', 1)[1]}={row[c]}" for c in many if not _missing(row[c])]
        texts.append(", ".join(dict.fromkeys(parts)))
    return pd.Series(texts, index=table.index, dtype=object)


def _says_nothing(table: pd.DataFrame, name: str) -> bool:
    behind = f"identity_{_BEHIND.get(name)}"
    return name in _INCIDENTAL or (behind in table and bool(table[behind].notna().all()))


def _mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """In exact arithmetic: what all seeds share is its own mean, and deviates by nothing."""
    if not values:
        return math.nan, math.nan
    mean = statistics.mean(values)
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def _error(group: pd.DataFrame, name: str, suffix: str) -> float:
    scores = group[f"{name}{suffix}"].dropna()
    errors = group[f"{name}_stderr{suffix}"].dropna()
    sampled = float(np.sqrt((errors**2).mean())) if len(errors) else math.nan
    spread = _mean_and_deviation(scores.tolist())[1] / math.sqrt(max(1, len(scores)))
    parts = [part for part in (sampled, spread) if not math.isnan(part)]
    return math.hypot(*parts) if parts else math.nan


def _sorted(table: pd.DataFrame) -> pd.DataFrame:
    """By model and task, the dense baseline first, then method, mode, level, seed."""
    if table.empty:
        return table.reset_index(drop=True)
    ranks = {"_pruned": table.apply(row_label, axis=1) != DENSE.label, "_method": table["method"].map(_method_rank)}
    keys = ["model", "task", "_pruned", "_method", "series", "mode", "sparsity", "variant"]
    keys += ["seed"] if "seed" in table else []
    ranked = pd.DataFrame({name: ranks.get(name, table.get(name)) for name in keys})
    order = ranked.sort_values(keys, key=_sortable, kind="stable").index
    return table.loc[order].reset_index(drop=True)


def _method_rank(method: str) -> int:
    known = (NO_METHOD, *METHODS)
    return known.index(method) if method in known else len(known)


def _sortable(column: pd.Series) -> pd.Series:
    return column if pd.api.types.is_numeric_dtype(column) else column.map(lambda v: "" if v is None else str(v))

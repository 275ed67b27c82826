"""The table that a study ends with on the terminal."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import Any

import pandas as pd
from rich.box import ASCII_DOUBLE_HEAD, SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparse_ft.analysis.numbers import shown, shown_with_error
from sparse_ft.analysis.table import MEAN, SCORED_AFTER, cell_table, row_label, scored_names
from sparse_ft.settings.modes import DENSE, is_tuned, mode_label
from sparse_ft.tracking.record import Run

__all__ = ["print_table", "print_tables", "scores_tables", "table_text", "terminal_table"]

_ABREAST = 8  # tasks beside each other


def terminal_table(runs: Iterable[Run]) -> Table:
    """One row a cell, a line in it for each time it was scored: what came out, then what was asked; failures say why.

    Model, task and method stand in the title where the study has one of each. Accuracy is that on the cell's own task;
    beside it that on the task scored beside it, or the mean of several. Sparsity is that asked for, and that of the
    merged model where it is another one. ``±`` is one standard error; a dash is what was not measured. Everything else
    that was measured is in the report's tables.
    """
    cells = cell_table(runs)
    one = {
        name: values.iloc[0] for name in ("model", "task") if len(values := cells[name].dropna().drop_duplicates()) == 1
    }
    methods = dict.fromkeys(cell["method"] for cell in cells.to_dict("records") if row_label(cell) != DENSE.label)
    method = str(*methods) if len(methods) == 1 else ""
    counted = f"{len(cells)} cell" + ("" if len(cells) == 1 else "s")
    title = " · ".join([*map(str, one.values()), *([method] if method else []), counted])
    table = Table(
        title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    named = [name for name in ("model", "task") if name not in one and cells[name].notna().any()]
    named += [name for name in ("seed", "variant") if cells[name].nunique() > 1]
    for name in named:
        table.add_column(name, overflow="fold")
    table.add_column("cell", min_width=16, overflow="fold")
    scores = _scores(cells, one.get("task", ""))
    for name in ("", *(heading for heading, _, _ in scores), "sparsity\n%", "vio-\nlations", "min-\nutes"):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in cells.to_dict("records"):
        stages = _stages(cell)
        table.add_row(
            *(str(cell[name] if cell[name] is not None else "") for name in named),
            _name(cell, method),
            _stacked(*stages.values()),
            *(_stacked(*(_score(cell, column, after, form) for after in stages)) for _, column, form in scores),
            _levels(cell),
            _violations(cell),
            shown(cell["minutes"], ".1f"),
        )
    return table


def _scores(cells: pd.DataFrame, task: str) -> list[tuple[str, str, str]]:
    """Heading, column and form of what a row shows."""
    beside, own = scored_names(cells), f"\n{task}" if task else ""
    result = [("perple-\nxity", "perplexity", ",.4g"), (f"accuracy{own}", "accuracy", ".3f")]
    if len(beside) == 1:
        result.append((f"accuracy\n{beside[0]}", f"{beside[0]}/accuracy", ".3f"))
    elif beside:
        result.append((f"accuracy\nmean of {len(beside)}", "mean_accuracy", ".3f"))
    return result


def scores_tables(runs: Iterable[Run]) -> list[Table]:
    """Of several tasks scored beside the cells' own: one row a cell, a column a task, the mean first; before tuning
    above, after tuning below. Of very many tasks several tables; none where no more than one was scored beside, which
    stands in the cells' own table."""
    cells = cell_table(runs)
    names = scored_names(cells)
    columns = [(MEAN, "mean_accuracy"), *((name, f"{name}/accuracy") for name in names)] if len(names) > 1 else []
    columns = [(name, column) for name, column in columns if any(f"{column}{s}" in cells for s in SCORED_AFTER)]
    tables = []
    for start in range(0, len(columns), _ABREAST):
        shown_here = columns[start : start + _ABREAST]
        title = "accuracy on the tasks scored beside" + (
            f" ({start + 1} to {start + len(shown_here)})" if start else ""
        )
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        several = [name for name in ("model", "task", "seed", "variant") if cells[name].nunique() > 1]
        for name in several:
            table.add_column("trained" if name == "task" else name, overflow="fold")
        table.add_column("cell", min_width=16, overflow="fold")
        for name, _ in shown_here:
            table.add_column(name, justify="right", overflow="fold")
        for cell in cells.to_dict("records"):
            table.add_row(
                *(str(cell[name] if cell[name] is not None else "") for name in several),
                _name(cell),
                *(
                    _stacked(*(_score(cell, column, after, ".3f") for after in _stages(cell)))
                    for _, column in shown_here
                ),
            )
        tables.append(table)
    return tables


def print_tables(console: Console, runs: Iterable[Run]) -> None:
    """Prints the table of the cells and those of the tasks scored beside."""
    runs = list(runs)
    for table in [terminal_table(runs), *scores_tables(runs)]:
        print_table(console, table)


def print_table(console: Console, table: Table) -> None:
    """Prints a table without cutting a number off: names fold in a narrow terminal, and where that is not enough
    its lines run on. What is no terminal (a pipe, a file) has room for all."""
    if console.options.ascii_only:  # the terminal cannot draw the lines of a box
        table.box = ASCII_DOUBLE_HEAD
    room = console.options.update(max_width=10_000)
    needed = console.measure(table, options=room)
    width = needed.maximum if not console.is_terminal else max(needed.minimum, min(console.width, needed.maximum))
    wide = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="standard")
    wide.print(table)
    # Another console's text: this one crops what it renders itself at its own width.
    console.print(Text.from_ansi(wide.file.getvalue()), soft_wrap=True, highlight=False, end="")


def table_text(*tables: Table) -> str:
    """The tables as plain text, as wide as they are."""
    console = Console(file=io.StringIO())
    for table in tables:
        print_table(console, table)
    return console.file.getvalue()


def _score(cell: dict[str, Any], column: str, after: str, form: str) -> str:
    return shown_with_error(cell.get(f"{column}{after}"), cell.get(f"{column}_stderr{after}"), form)


def _name(cell: dict[str, Any], method: str = "") -> Text:
    """``method``: what the title says, for all."""
    mode, series = mode_label(cell["mode"], cell["sparsity"]), row_label(cell)
    if series == DENSE.label:
        apart = "\n" if is_tuned(cell["mode"]) else ", "
        name = Text(series if cell["mode"] == DENSE.name else f"{series}{apart}{mode}")
    else:
        name = Text(f"{_percent(cell['sparsity'])} % {series.removeprefix(f'{method} ')}\n{mode}")
    if cell["status"] != "FINISHED":
        said = cell["failure_class"] or str(cell["status"]).lower()
        name.append(f"\n{said}", style="bold red")
    for part in (cell["warning"] or "").split("; "):
        kind, colon, _ = part.partition(": ")
        if colon and kind.isidentifier():  # merge_cost, no_weight_moved; the run holds the whole
            name.append(f"\n{kind}", style="yellow")
    return name


def _stages(cell: dict[str, Any]) -> dict[str, str]:
    """When a cell was scored, by what the columns of those scores end with."""
    if not is_tuned(cell["mode"]):
        return {"": "untuned"}
    recovered = {} if math.isnan(cell["loss_recovered"]) else {"_recovered": "recovered"}
    tuned = "not tuned" if "no_weight_moved" in (cell["warning"] or "") else "tuned"
    return {"_untuned": "untuned", **recovered, "": tuned}


def _stacked(*stages: str) -> Text:
    """Before tuning above, after tuning below."""
    *before, last = stages
    return Text.assemble(*((f"{stage}\n", "dim") for stage in before), last, justify="right")


def _percent(value: float) -> str:
    """Enough digits to tell an exact sparsity from one that a merge has diluted."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{100 * value:.3f}".rstrip("0").rstrip(".")
    return text


def _levels(cell: dict[str, Any]) -> str:
    """The sparsity asked for; beside it that of the merged model, where it is another."""
    asked, merged = _percent(cell["sparsity"]), _percent(cell["sparsity_after_merge"])
    return asked if merged in (asked, "–") else f"{asked} → {merged}"


def _violations(cell: dict[str, Any]) -> Text:
    # Weights that break the promise of the cell's mode: any is an alarm.
    count = cell["sparsity_violations"]
    return Text(shown(count, ",.0f"), style="bold red" if count > 0 else "")

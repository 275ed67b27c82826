"""``report.html``: the study on one page that needs nothing but itself."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sparse_ft.analysis.beside import wide_points
from sparse_ft.analysis.columns import Column, Table, number, percent, plus_minus, text
from sparse_ft.analysis.panels import short_names
from sparse_ft.analysis.table import row_label
from sparse_ft.settings.modes import mode_label

__all__ = ["ReportFigure", "ReportParts", "report_html"]

_OWN = {"style": "css", "script": "js"}  # of the page's folder, written into it as they are


@dataclass(frozen=True)
class ReportFigure:
    """A picture for the page; ``path`` is an SVG or PNG file."""

    path: Path
    title: str
    caption: str

    @property
    def wide(self) -> bool:
        """Whether it gets a row of its own."""
        width = re.search(rb'<svg[^>]* width="([\d.]+)pt"', self.path.read_bytes()[:4000])
        return width is None or float(width.group(1)) > 520

    @property
    def data(self) -> str:
        """The file as a data URI."""
        kind = {".svg": "image/svg+xml", ".png": "image/png"}[self.path.suffix]
        return f"data:{kind};base64,{base64.b64encode(self.path.read_bytes()).decode('ascii')}"


@dataclass
class ReportParts:
    """What the page is made of."""

    title: str
    cells: pd.DataFrame
    points: pd.DataFrame
    holes: pd.DataFrame
    protocol: Mapping[str, Any]
    sentences: Sequence[str]
    figures: Sequence[ReportFigure]
    skipped: Mapping[str, str] = field(default_factory=dict)
    baseline: Mapping[str, pd.DataFrame] | None = None
    beside: pd.DataFrame = field(default_factory=pd.DataFrame)


def report_html(parts: ReportParts) -> str:
    """The whole page as a string."""
    page = Environment(
        loader=PackageLoader("sparse_ft.analysis", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    own = {name: Markup(page.loader.get_source(page, f"report.{end}")[0]) for name, end in _OWN.items()}
    return page.get_template("report.html").render(
        **own,
        title=parts.title or "Sparse fine-tuning study",
        question=_question(parts.cells),
        counts=_counts(parts.cells),
        notice=_notice(parts),
        answers=parts.sentences if len(parts.cells) else [],
        protocol=_protocol(parts.protocol),
        figures=parts.figures,
        skipped=parts.skipped,
        points=_points(parts.points),
        beside=_beside(parts.beside),
        cells=_cells(parts.cells),
        twins=len(parts.cells) > 0 and parts.cells["same_as"].notna().any(),
        reasons=_reasons(parts.holes),
        holes=_holes(parts.holes),
        published=None if parts.baseline is None else _published(parts.baseline),
    )


def _question(cells: pd.DataFrame) -> str:
    if cells.empty:
        return "How sparse can a model be made, with which pruning method, and still be fine-tuned well?"
    models = list(short_names(cells["model"].dropna().drop_duplicates().tolist()).values())
    tasks = cells["task"].dropna().drop_duplicates().tolist()
    return (
        f"How sparse can {_either(models)} be made, with which pruning method, and still be fine-tuned well on "
        f"{_either(tasks)}?"
    )


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1] if names else "the model"


def _counts(cells: pd.DataFrame) -> str:
    if cells.empty:
        return "No cells."
    counts = cells["status"].value_counts()
    named = [f"{count} {str(status).lower()}" for status, count in counts.items()]
    seeds = cells["seed"].nunique()
    return f"{len(cells)} cell{'s' * (len(cells) != 1)}: {', '.join(named)}." + (
        f" {seeds} seeds." if seeds > 1 else ""
    )


def _notice(parts: ReportParts) -> str | None:
    if parts.cells.empty:
        return "This study has no cells: no run of it is tagged kind=cell. There is nothing to show."
    unfinished = int((parts.cells["status"] != "FINISHED").sum())
    if unfinished == len(parts.cells):
        return "No cell of this study has finished. The reasons stand under “What is missing”."
    if len(parts.holes):
        return (
            f"{len(parts.holes)} cell{'s' * (len(parts.holes) != 1)} of this study "
            f"{'has' if len(parts.holes) == 1 else 'have'} no result; the answers below rest on the others."
        )
    return "This study has a single cell: there is nothing to compare it with." if len(parts.cells) == 1 else None


def _protocol(protocol: Mapping[str, Any]) -> Table | None:
    rows = [{"key": key, "where": "all cells", "value": value} for key, value in protocol.get("shared", {}).items()]
    for group in ("by_task", "by_model"):
        for where, values in protocol.get(group, {}).items():
            rows += [{"key": key, "where": where, "value": value} for key, value in values.items()]
    for key, values in protocol.get("varies", {}).items():
        rows.append({"key": key, "where": "varies", "value": ", ".join(map(str, values))})
    if not rows:
        return None
    columns = [
        Column("what", text("key")),
        Column("where", text("where"), choices=True),
        Column("value", text("value"), wide=True),
    ]
    return Table(columns, pd.DataFrame(rows).sort_values("key", kind="stable"))


def _identity(frame: pd.DataFrame) -> list[Column]:
    columns = [Column("model", text("model"), choices=True), Column("task", text("task"), choices=True),
               Column("method", row_label, choices=True), Column("mode", _mode, choices=True)]  # fmt: skip
    if "variant" in frame and frame["variant"].fillna("").ne("").any():
        columns.append(Column("variant", text("variant"), choices=True))
    return [*columns, Column("sparsity %", percent("sparsity"), _value("sparsity"), choices=True)]


def _mode(row: dict[str, Any]) -> str:
    return mode_label(row["mode"], row.get("sparsity"))


def _value(name: str) -> Any:
    return lambda row: row.get(name, math.nan)


def _points(points: pd.DataFrame) -> Table | None:
    if points.empty:
        return None
    columns = [
        *_identity(points),
        Column("cells", number("n", ".0f"), _value("n")),
        Column("accuracy", plus_minus("accuracy", "accuracy_error"), _value("accuracy")),
        Column("recovery %", plus_minus("recovery", "recovery_error", ".1f", 100), _value("recovery")),
        Column("accuracy untuned", plus_minus("accuracy_untuned", "accuracy_error_untuned"),
               _value("accuracy_untuned")),
        Column("accuracy re-masked", plus_minus("accuracy_remasked", "accuracy_error_remasked"),
               _value("accuracy_remasked")),
        Column("loss", plus_minus("loss", "loss_error"), _value("loss")),
        Column("perplexity", plus_minus("perplexity", "perplexity_error", ",.4g"), _value("perplexity")),
        Column("perplexity untuned", plus_minus("perplexity_untuned", "perplexity_error_untuned", ",.4g"),
               _value("perplexity_untuned")),
        Column("training tokens/s", number("train_tokens_per_second", ",.0f"), _value("train_tokens_per_second")),
        Column("scoring samples/s", number("eval_samples_per_second"), _value("eval_samples_per_second")),
    ]  # fmt: skip
    if "recovery_reason" in points and points["recovery_reason"].fillna("").ne("").any():
        columns.append(Column("why no recovery", text("recovery_reason"), wide=True))
    return Table(columns, points)


def _beside(points: pd.DataFrame) -> Table | None:
    """A row a line and level, a column a task: what a paper's table has."""
    if points.empty:
        return None
    wide, names = wide_points(points)
    columns = _identity(wide)
    for name in names:
        columns.append(Column(name, plus_minus(name, f"{name} error"), _value(name)))
    name = f"{names[0]} untuned"
    return Table([*columns, Column(name, plus_minus(name, f"{name} error"), _value(name))], wide)


def _cells(cells: pd.DataFrame) -> Table | None:
    if cells.empty:
        return None
    columns = [
        *_identity(cells),
        Column("achieved %", percent("sparsity_achieved"), _value("sparsity_achieved")),
        Column("after merge %", percent("sparsity_after_merge"), _value("sparsity_after_merge")),
        Column("violations", number("sparsity_violations", ",.0f"), _value("sparsity_violations")),
        Column("accuracy", plus_minus("accuracy", "accuracy_stderr"), _value("accuracy")),
        Column("loss", plus_minus("loss", "loss_stderr"), _value("loss")),
        Column("perplexity", plus_minus("perplexity", "perplexity_stderr", ",.4g"), _value("perplexity")),
        Column("training tokens/s", number("train_tokens_per_second", ",.0f"), _value("train_tokens_per_second")),
        Column("peak GB", number("peak_bytes", ".2f", 1e-9), _value("peak_bytes")),
        Column("minutes", number("minutes", ".1f"), _value("minutes")),
        Column("seed", text("seed"), lambda row: math.nan if row["seed"] is None else row["seed"], choices=True),
        Column("status", lambda row: str(row["status"]).lower(), choices=True),
        Column("run", text("run_id")),
    ]
    if cells["same_as"].notna().any():
        columns.append(Column("same as", text("same_as")))
    return Table(columns, cells)


def _reasons(holes: pd.DataFrame) -> Table | None:
    if holes.empty:
        return None
    counts = holes["reason"].value_counts().rename_axis("reason").reset_index(name="cells")
    columns = [Column("reason", text("reason")), Column("cells", number("cells", ".0f"), _value("cells"))]
    return Table(columns, counts, small=True)


def _holes(holes: pd.DataFrame) -> Table | None:
    if holes.empty:
        return None
    named = holes.assign(series=holes["method"], status=None)
    columns = [
        *_identity(named),
        Column("reason", text("reason"), choices=True),
        Column("message", text("message"), wide=True),
        Column("run", text("run_id")),
    ]
    return Table(columns, named)


def _published(baseline: Mapping[str, pd.DataFrame]) -> dict[str, Table | None]:
    joined, rest = baseline["joined"], baseline["not_comparable"]
    head = [Column("model", text("model"), choices=True), Column("task", text("task"), choices=True)]
    tail = [Column("source", text("source"), wide=True), Column("protocol", text("protocol"), wide=True)]
    level = [Column("mode", _mode, choices=True), Column("sparsity %", percent("sparsity"), _value("sparsity"))]
    tables: dict[str, Table | None] = {"joined": None, "rest": None}
    if len(joined):
        columns = [
            *head,
            Column("method", text("series"), choices=True),
            *level,
            Column("measure", text("measure"), choices=True),
            Column("published", number("published"), _value("published")),
            Column("here", plus_minus("ours", "ours_error", ",.4g"), _value("ours")),
            Column("difference", number("difference", "+,.4g"), _value("difference")),
            *tail,
        ]
        tables["joined"] = Table(columns, joined)
    if len(rest):
        columns = [
            *head,
            Column("method", text("method"), choices=True),
            Column("importance", text("importance"), choices=True),
            *level,
            Column("measure", text("measure"), choices=True),
            Column("published", number("published"), _value("published")),
            Column("why not comparable", text("reason"), wide=True),
            *tail,
        ]
        tables["rest"] = Table(columns, rest)
    return tables

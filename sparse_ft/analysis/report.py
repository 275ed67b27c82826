"""``report.html``: the study on one page that needs nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from sparse_ft.analysis.html import Column, figure, number, percent, plus_minus, table, text
from sparse_ft.analysis.panels import short_names
from sparse_ft.analysis.sentences import Sentence
from sparse_ft.analysis.terminal import MODE_NAMES

__all__ = ["ReportFigure", "ReportParts", "report_html"]

# Nothing may be loaded from anywhere, whatever ends up in a title or a message.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class ReportFigure:
    """A picture for the page; ``path`` is an SVG or PNG file."""

    path: Path
    title: str
    caption: str


@dataclass
class ReportParts:
    """What the page is made of."""

    title: str
    cells: pd.DataFrame
    points: pd.DataFrame
    holes: pd.DataFrame
    protocol: Mapping[str, Any]
    sentences: Sequence[Sentence]
    figures: Sequence[ReportFigure]
    skipped: Mapping[str, str] = field(default_factory=dict)
    baseline: Mapping[str, pd.DataFrame] | None = None


def report_html(parts: ReportParts) -> str:
    """The whole page as a string. It loads nothing, and runs in a sandboxed frame (``allow-scripts``)."""
    sections = [
        ("answer", "Answer", _answer(parts)),
        ("protocol", "Protocol", _protocol(parts.protocol)),
        ("figures", "Figures", _figures(parts)),
        ("points", "Points of the curves", _points(parts.points)),
        ("cells", "Cells", _cells(parts.cells)),
        ("missing", "What is missing", _missing(parts.cells, parts.holes)),
    ]
    if parts.baseline is not None:
        sections.append(("published", "Published numbers", _published(parts.baseline)))
    links = "".join(f'<button type="button" data-part="{key}">{name}</button>' for key, name, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{name}</h2>{content}</section>' for key, name, content in sections)
    title = parts.title or "Sparse fine-tuning study"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_asset("report.css")}</style></head>\n'
        f"<body><main><h1>{escape(title)}</h1><p>{escape(_question(parts.cells))}</p>"
        f'<p class="muted">{escape(_counts(parts.cells))}</p><nav aria-label="parts of the page">{links}</nav>\n'
        f"{body}</main>\n<script>{_asset('report.js')}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return (resources.files("sparse_ft.analysis") / "assets" / name).read_text("utf-8")


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


def _answer(parts: ReportParts) -> str:
    if parts.cells.empty:
        return (
            '<p class="notice">This study has no cells: no run of it is tagged kind=cell. Nothing was measured, so '
            "there is nothing to draw.</p>"
        )
    notice = ""
    unfinished = int((parts.cells["status"] != "FINISHED").sum())
    if unfinished == len(parts.cells):
        notice = '<p class="notice">No cell of this study has finished. The reasons stand under “What is missing”.</p>'
    elif len(parts.holes):
        notice = (
            f'<p class="notice">{len(parts.holes)} cell{"s" * (len(parts.holes) != 1)} of this study '
            f"{'has' if len(parts.holes) == 1 else 'have'} no result; the answers below rest on the others.</p>"
        )
    elif len(parts.cells) == 1:
        notice = '<p class="notice">This study has a single cell: there is nothing to compare it with.</p>'
    items = "".join(f"<li>{escape(sentence.text)}</li>" for sentence in parts.sentences)
    return f'{notice}<ul class="answers">{items}</ul>'


def _protocol(protocol: Mapping[str, Any]) -> str:
    rows = [{"key": key, "where": "all cells", "value": value} for key, value in protocol.get("shared", {}).items()]
    for group in ("by_task", "by_model"):
        for where, values in protocol.get(group, {}).items():
            rows += [{"key": key, "where": where, "value": value} for key, value in values.items()]
    for key, values in protocol.get("varies", {}).items():
        rows.append({"key": key, "where": "varies", "value": ", ".join(map(str, values))})
    if not rows:
        return '<p class="muted">No finished cell has said how it was measured.</p>'
    columns = [
        Column("what", text("key")),
        Column("where", text("where"), choices=True),
        Column("value", text("value"), wide=True),
    ]
    frame = pd.DataFrame(rows).sort_values("key", kind="stable")
    return f"<p>Numbers compare only where these agree.</p>{table(frame, columns)}"


def _figures(parts: ReportParts) -> str:
    if not parts.figures:
        return '<p class="muted">Nothing to draw.</p>'
    shown = "".join(figure(f.path, f.title, f.caption) for f in parts.figures)
    notes = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in parts.skipped.items())
    notes = f'<h3>Not drawn</h3><ul class="muted">{notes}</ul>' if notes else ""
    return f'<div class="gallery">{shown}</div>{notes}'


def _identity(frame: pd.DataFrame) -> list[Column]:
    columns = [Column("model", text("model"), choices=True), Column("task", text("task"), choices=True),
               Column("method", text("series"), choices=True), Column("mode", _mode, choices=True)]  # fmt: skip
    if "variant" in frame and frame["variant"].fillna("").ne("").any():
        columns.append(Column("variant", text("variant"), choices=True))
    return [*columns, Column("sparsity %", percent("sparsity"), _value("sparsity"), choices=True)]


def _mode(row: dict[str, Any]) -> str:
    return MODE_NAMES.get(row["mode"], str(row["mode"]))


def _value(name: str) -> Any:
    return lambda row: row.get(name, math.nan)


def _points(points: pd.DataFrame) -> str:
    if points.empty:
        return '<p class="muted">No cell has finished.</p>'
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
    return (
        "<p>Means over seeds. ± is one standard error; recovery is the share of the dense fine-tuned accuracy, "
        f"measured under the same protocol.</p>{table(points, columns)}"
    )


def _cells(cells: pd.DataFrame) -> str:
    if cells.empty:
        return '<p class="muted">None.</p>'
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
    same = cells["same_as"].notna().any()
    if same:
        columns.append(Column("same as", text("same_as")))
    note = "<p>Cells at 0 % that are one computation show the scores of the run named in the last column.</p>"
    return (note if same else "") + table(cells, columns)


def _missing(cells: pd.DataFrame, holes: pd.DataFrame) -> str:
    if holes.empty:
        return "<p>Nothing: every cell has a score.</p>" if len(cells) else "<p>There is no plan to compare with.</p>"
    counts = holes["reason"].value_counts().rename_axis("reason").reset_index(name="cells")
    summary = table(counts, [Column("reason", text("reason")), Column("cells", number("cells", ".0f"),
                                                                      _value("cells"))], small=True)  # fmt: skip
    columns = [
        *_identity(holes.assign(series=holes["method"])),
        Column("reason", text("reason"), choices=True),
        Column("message", text("message"), wide=True),
        Column("run", text("run_id")),
    ]
    return summary + table(holes.assign(series=holes["method"], status=None), columns)


def _published(baseline: Mapping[str, pd.DataFrame]) -> str:
    joined, rest = baseline["joined"], baseline["not_comparable"]
    head = [Column("model", text("model"), choices=True), Column("task", text("task"), choices=True)]
    tail = [Column("source", text("source"), wide=True), Column("protocol", text("protocol"), wide=True)]
    level = [Column("mode", _mode, choices=True), Column("sparsity %", percent("sparsity"), _value("sparsity"))]
    parts = []
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
        parts.append(f"<p>Measured under equal protocols:</p>{table(joined, columns)}")
    else:
        parts.append("<p>No published number was measured under the protocol of this study.</p>")
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
        parts.append(f"<h3>Not comparable</h3>{table(rest, columns)}")
    return "".join(parts)

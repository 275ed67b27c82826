"""Tables and figures as HTML: escaped, with the numbers they sort by."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from sparse_ft.analysis.numbers import shown, shown_with_error

__all__ = ["Column", "embedded", "figure", "number", "percent", "plus_minus", "table", "text"]

Show = Callable[[dict[str, Any]], str]


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, how a row is shown, and the value it sorts by (a text without one).

    ``choices`` offers the column's values as a filter; ``wide`` lets long text wrap.
    """

    heading: str
    show: Show
    value: Callable[[dict[str, Any]], float] | None = None
    choices: bool = False
    wide: bool = False


def table(rows: pd.DataFrame, columns: Sequence[Column], small: bool = False) -> str:
    """A table; one that is not ``small`` gets sorting and filters from the page's script."""
    heads = "".join(
        f"<th{' class=number' if column.value else ''}{' data-choices' if column.choices else ''}>"
        f"{escape(column.heading)}</th>"
        for column in columns
    )
    body = []
    for row in rows.to_dict("records"):
        failed = " class=failed" if row.get("status") not in (None, "FINISHED") else ""
        body.append(f"<tr{failed}>" + "".join(_cell(row, column) for column in columns) + "</tr>")
    kind = ("scroll small", "") if small else ("scroll", " class=data")
    return (
        f'<div class="{kind[0]}"><table{kind[1]}><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def text(name: str) -> Show:
    """Shows a column as it is; what is missing is empty."""
    return lambda row: "" if _missing(row.get(name)) else str(row[name])


def number(name: str, form: str = ",.4g", factor: float = 1.0) -> Show:
    """Shows a number as `sparse_ft.analysis.numbers.shown` does."""
    return lambda row: shown(_times(row.get(name), factor), form)


def percent(name: str) -> Show:
    """Shows a fraction in percent, with the digits that tell 50 from 49.998."""

    def show(row: dict[str, Any]) -> str:
        value = row.get(name)
        return "–" if _missing(value) else f"{100 * value:.3f}".rstrip("0").rstrip(".")

    return show


def plus_minus(name: str, error: str, form: str = ".3f", factor: float = 1.0) -> Show:
    """Shows a number with its standard error, where that is known."""
    return lambda row: shown_with_error(_times(row.get(name), factor), _times(row.get(error), factor), form)


def figure(path: Path, title: str, caption: str) -> str:
    """A figure with its picture inside the page; wide ones get a row of their own."""
    width = re.search(rb'<svg[^>]* width="([\d.]+)pt"', path.read_bytes()[:4000])
    kind = " class=wide" if width is None or float(width.group(1)) > 520 else ""
    return (
        f'<figure{kind}><img alt="{escape(title)}" src="{embedded(path)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def embedded(path: Path) -> str:
    """A picture file as a data URI."""
    kind = {".svg": "image/svg+xml", ".png": "image/png"}[path.suffix]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _cell(row: dict[str, Any], column: Column) -> str:
    shown = escape(column.show(row))
    if column.value is not None:
        value = column.value(row)
        key = "" if _missing(value) else repr(float(value)).replace("inf", "1e999")
        return f'<td class=number data-value="{key}">{shown}</td>'
    return f"<td class=wide>{shown}</td>" if column.wide else f"<td>{shown}</td>"


def _times(value: Any, factor: float) -> Any:
    return None if _missing(value) else value * factor


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))

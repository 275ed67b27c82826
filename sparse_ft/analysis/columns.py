"""Tables of the report: what their columns show, and the numbers they sort by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sparse_ft.analysis.numbers import shown, shown_with_error

__all__ = ["Column", "Table", "number", "percent", "plus_minus", "text"]

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

    def key(self, row: Mapping[str, Any]) -> str:
        """The number that a row sorts by, as a script reads it; empty for none."""
        value = math.nan if self.value is None else self.value(row)
        return "" if _missing(value) else repr(float(value)).replace("inf", "1e999")


@dataclass(frozen=True)
class Table:
    """Rows of a frame under columns; one that is not ``small`` gets sorting and filters from the page's script."""

    columns: Sequence[Column]
    frame: pd.DataFrame
    small: bool = False

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict a row."""
        return self.frame.to_dict("records")


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


def _times(value: Any, factor: float) -> Any:
    return None if _missing(value) else value * factor


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))

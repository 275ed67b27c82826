"""Numbers as people read them, on a terminal and on a page."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["shown", "shown_with_error"]


def shown(value: Any, form: str = ",.4g") -> str:
    """A number, grouped by thousands and never in powers of ten; a dash for what was not measured."""
    if _missing(value):
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{value:,.0f}" if abs(value) >= 1e4 else format(value, form)


def shown_with_error(value: Any, error: Any, form: str = ",.4g") -> str:
    """A number with its standard error, as far as both are known.

    The error has the digits of ``form`` where these are fixed, else two significant ones.
    """
    if _missing(value) or _missing(error) or math.isinf(value) or math.isinf(error):
        return shown(value, form)
    digits = form if form.endswith("f") else ",.2g" if error < 100 else ",.0f"
    return f"{shown(value, form)} ± {shown(error, digits)}"


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))

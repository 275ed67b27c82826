"""Tables as CSV that a spreadsheet opens without running anything that stands in them."""

from __future__ import annotations

from typing import Any

import pandas as pd

__all__ = ["csv_text"]

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def csv_text(frame: pd.DataFrame) -> str:
    """The table as CSV, without its index. Text that a spreadsheet would take for a formula gets a ``'`` before it
    (https://owasp.org/www-community/attacks/CSV_Injection); numbers stay as they are."""
    plain = frame.copy()
    for place, kind in enumerate(plain.dtypes):
        if not pd.api.types.is_numeric_dtype(kind):
            plain.isetitem(place, plain.iloc[:, place].map(_plain))
    plain.columns = [_plain(name) for name in plain.columns]
    return plain.to_csv(index=False)


def _plain(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    value = value.replace("\r\n", "\n").replace("\r", "\n")  # which pandas quotes; what follows a bare \r begins a row
    if not value.lstrip(" ").startswith(_FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return "'" + value
    return value

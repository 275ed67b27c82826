"""Sparsity levels as people write them; levels and modes as names carry them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from sparse_ft.errors import UserError

__all__ = ["level_label", "levels_text", "parse_levels"]


def parse_levels(text: str) -> tuple[float, ...]:
    """Sparsities from the list ``0.5,0.7`` or the range ``0:0.9:0.1`` (both ends included), ascending, no doubles.

    Raises:
        UserError: text that is neither, a level outside [0, 1], or a step that is not positive.
    """
    try:
        if ":" in text:
            first, last, step = (float(part) for part in text.split(":"))
            if not (step > 0 and last >= first):
                raise ValueError
            count = math.floor((last - first) / step + 1e-9)
            if count > 10_000:
                raise ValueError
            levels = [round(first + i * step, 10) for i in range(count + 1)]
        else:
            levels = [float(part) for part in text.split(",")]
    except (ValueError, OverflowError):
        raise UserError(f"sparsities is '{text}'; write a list such as 0.5,0.7 or a range such as 0:0.9:0.1.") from None
    if not all(0 <= level <= 1 for level in levels):
        raise UserError(f"sparsities is '{text}'; every level must lie between 0 and 1 (50 % is 0.5).")
    return tuple(sorted(set(levels)))


def levels_text(levels: Iterable[float]) -> str:
    """The list that `parse_levels` reads back as these very numbers, ascending, no doubles: ``0,0.3333333333,0.5``."""
    return ",".join(short if float(short := f"{x:g}") == x else repr(float(x)) for x in sorted(set(levels)))


def level_label(sparsity: float) -> str:
    """The level in percent, for names of files and runs: 0.5 -> ``50``, 0.125 -> ``12.5``."""
    return f"{round(100 * sparsity, 8):.8f}".rstrip("0").rstrip(".")

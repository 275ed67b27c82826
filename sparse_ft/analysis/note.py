"""A study's note: its answers in words, its table, and its figures' names, for MLflow's page of the run."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from sparse_ft.analysis.numbers import shown, shown_with_error
from sparse_ft.analysis.sentences import Sentence
from sparse_ft.analysis.table import row_label
from sparse_ft.settings.modes import mode_label
from sparse_ft.tracking.notes import command_block, markdown_table

__all__ = ["study_note"]

_ROOM = 7000  # characters of the 8,000 that a tag holds: the last line comes on top
_SCORES = {"accuracy": ".3f", "perplexity": ",.4g", "loss": ".3f"}


def study_note(
    sentences: Iterable[Sentence], cells: pd.DataFrame, figures: Iterable[str], command: str | None = None
) -> str:
    """Markdown: the answers, how to do it again, the figures, and as much of the table as a note holds.

    Args:
        sentences: the answers, one a model and task.
        cells: from `sparse_ft.analysis.table.cell_table`.
        figures: names of figures, which lie in ``report/figures``.
        command: that runs it again; None leaves that out.
    """
    parts = [sentence.text for sentence in sentences] or ["No cell has a result."]
    if lost := int((cells["status"] != "FINISHED").sum()) if len(cells) else 0:
        parts.append(f"**{lost} of {len(cells)} cells have no result**; `report/holes.csv` says why.")
    if names := ", ".join(f"`{name}`" for name in figures):
        parts.append(f"Page: `report/report.html`. Figures, in `report/figures`: {names}.")
    else:
        parts.append("Page: `report/report.html`.")
    if command:
        parts.append(command_block(command))
    text = "\n\n".join(parts)
    return f"{text}\n\n{_table(cells, _ROOM - len(text))}".rstrip()


def _table(cells: pd.DataFrame, room: int) -> str:
    named = [name for name in ("model", "task", "seed", "variant") if cells[name].nunique() > 1] if len(cells) else []
    heads = [*named, "method", "mode", "sparsity %", *_SCORES]
    rows: list[list[str]] = []
    for cell in cells.to_dict("records"):
        scores = [shown_with_error(cell[name], cell[f"{name}_stderr"], form) for name, form in _SCORES.items()]
        if cell["status"] != "FINISHED":
            scores[0] = cell["failure_class"] or str(cell["status"]).lower()
        words = [str(cell[name]) for name in named] + [row_label(cell), mode_label(cell["mode"], cell["sparsity"])]
        rows.append([*words, shown(100 * cell["sparsity"], ".4g"), *scores])
    count = len(rows)
    while rows and len(text := markdown_table(heads, rows, len(named) + 2)) > room:
        rows = rows[: len(rows) * 3 // 4]
    if not rows:
        return "The table is `report/summary.csv`." if count else ""
    return text if len(rows) == count else f"{text}\n\n{len(rows)} of {count} cells; all are in `report/summary.csv`."

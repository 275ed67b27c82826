"""A sheet of panels with its title above and its legend below, laid out in inches.

The layout is worked out from the contents' own sizes: matplotlib's constrained layout takes most of a
second a figure and lets a legend and a note outside the panels overlap.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sparse_ft.analysis.style import RULE

__all__ = ["Sheet", "short_names"]

_LEFT, _RIGHT, _GAP_X, _GAP_Y, _AXIS = 0.85, 0.15, 0.62, 0.62, 0.5  # inches around and between panels
_ABREAST = 5  # panels beside each other
_TITLE, _NOTE, _ENTRY = 0.24, 0.16, 0.2  # height of a line of each


class Sheet:
    """Panels for every (model, task) of ``table``: models by rows and tasks by columns.

    With one model or one task, or very many tasks, they flow in rows of up to three. ``size`` is a panel's width and
    height.
    """

    def __init__(self, table: pd.DataFrame, size: tuple[float, float] = (3.3, 2.2), left: float = _LEFT):
        models, tasks = table["model"].drop_duplicates().tolist(), table["task"].drop_duplicates().tolist()
        names = short_names(models)
        self.places = [(model, task) for model in models for task in tasks]
        self.titles = [f"{task} · {names[model]}" for model, task in self.places]
        alone = len(self.places) == 1
        if len(models) == 1 or len(tasks) == 1 or len(tasks) > _ABREAST:
            self.columns = min(3, len(self.places))
        else:
            self.columns = len(tasks)
        self.rows = math.ceil(len(self.places) / self.columns)
        self.size = (max(size[0], 5.4), max(size[1], 3.1)) if alone else size
        self.left = left
        self.width = left + _RIGHT + self.columns * self.size[0] + (self.columns - 1) * _GAP_X

    def draw(
        self,
        panel: Callable[[Axes, str, str], bool],
        heading: str,
        note: str,
        labels: tuple[str, str],
        legend: Callable[[], Sequence[Line2D]],
    ) -> Figure:
        """The figure: ``panel`` fills one place and says whether it had anything to show.

        ``labels`` name the axes, ``note`` stands small under the heading; ``legend`` is asked for its
        entries once all panels are drawn.
        """
        figure = Figure(figsize=(self.width, 1.0))
        axes = [figure.add_subplot(self.rows, self.columns, place + 1) for place in range(len(self.places))]
        for place, (ax, (model, task)) in enumerate(zip(axes, self.places, strict=True)):
            ax.set_title(self.titles[place], loc="left")
            if not panel(ax, model, task):
                ax.text(0.5, 0.5, "no measurement", ha="center", va="center", transform=ax.transAxes, color=RULE)
            if place % self.columns == 0:
                ax.set_ylabel(labels[1])
            if place >= len(self.places) - self.columns:
                ax.set_xlabel(labels[0])
        self._arrange(figure, _lines(heading, self.width, 8.6), _lines(note, self.width, 15.5), list(legend()))
        return figure

    def _arrange(self, figure: Figure, heading: list[str], note: list[str], entries: list[Line2D]) -> None:
        columns = _legend_columns(entries, self.width)
        entry_rows = math.ceil(len(entries) / columns) if entries else 0
        top = 0.1 + _TITLE * len(heading) + _NOTE * len(note) + 0.36
        bottom = _AXIS + (entry_rows * _ENTRY + 0.12 if entries else 0.05)
        height = top + bottom + self.rows * self.size[1] + (self.rows - 1) * _GAP_Y
        figure.set_size_inches(self.width, height)
        figure.subplots_adjust(
            left=self.left / self.width, right=1 - _RIGHT / self.width, top=1 - top / height, bottom=bottom / height,
            wspace=_GAP_X / self.size[0], hspace=_GAP_Y / self.size[1],
        )  # fmt: skip
        y = 0.1
        for line in heading:
            figure.text(0.12 / self.width, 1 - y / height, line, va="top", fontsize=11, fontweight="bold")
            y += _TITLE
        for line in note:
            figure.text(0.12 / self.width, 1 - y / height, line, va="top", fontsize=7.5, color="#555555")
            y += _NOTE
        if entries:
            anchor = {"loc": "lower left", "bbox_to_anchor": (0.1 / self.width, 0.04 / height), "borderaxespad": 0}
            spacing = {"handlelength": 3.2, "columnspacing": 1.6, "labelspacing": 0.45}
            figure.legend(handles=entries, ncols=columns, **anchor, **spacing)


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Model names without their organisation or folder, where that leaves them different."""
    short = {model: str(model).rstrip("/").rsplit("/", 1)[-1] for model in models}
    return short if len(set(short.values())) == len(short) else {model: str(model) for model in models}


def _legend_columns(entries: Sequence[Line2D], width: float) -> int:
    if not entries:
        return 1
    longest = max(len(str(entry.get_label())) for entry in entries)
    return max(1, min(len(entries), 4, int(width / (0.075 * longest + 0.65))))


def _lines(text: str, width: float, per_inch: float) -> list[str]:
    return [part for line in text.splitlines() for part in textwrap.wrap(line, int(width * per_inch))]

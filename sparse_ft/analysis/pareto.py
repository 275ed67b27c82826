"""Accuracy against throughput, with the front of the cells that nothing beats in both."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sparse_ft.analysis.figures import legend_entries
from sparse_ft.analysis.panels import Sheet
from sparse_ft.analysis.performance import pareto_front
from sparse_ft.analysis.style import DENSE, RULE, Look, line_handle, looks
from sparse_ft.settings import modes

__all__ = ["measured_pareto", "pareto_figure"]

_NEAR = 0.055  # labels keep this part of a panel's height or width from each other


def measured_pareto(table: pd.DataFrame) -> Figure | None:
    """`pareto_figure` of the measured speed of writing (``measure: true``), each model in its fastest form."""
    return pareto_figure(
        table,
        column="measured_tokens_per_second",
        speed="measured speed of writing",
        unit="tokens per second, 8 at once, in the fastest form",
    )


def pareto_figure(
    table: pd.DataFrame,
    title: str = "",
    column: str = "eval_samples_per_second",
    speed: str = "evaluation throughput",
    unit: str = "samples per second",
) -> Figure | None:
    """Accuracy against measured throughput a (model, task); None where not both were measured.

    ``table`` is the performance table. The front is the set of points that no other beats in both; its
    points carry their sparsity, as far as the labels have room.
    """
    known = table[table["accuracy"].notna() & table[column].notna()]
    if known.empty:
        return None
    all_looks = looks(table)
    used: dict[tuple[str, str, str], Look] = {}
    extra: dict[str, Line2D] = {}

    def draw(axes: Axes, model: str, task: str) -> bool:
        here = known[(known["model"] == model) & (known["task"] == task)]
        if here.empty:
            return False
        for key, points in here.groupby(["series", "variant", "mode"], sort=False):
            if points["series"].iloc[0] == modes.DENSE.label:
                tuned = modes.is_tuned(points["mode"].iloc[0])
                name = f"{modes.DENSE.label}, {'fine-tuned' if tuned else modes.NOT_TUNED}"
                style = {"color": DENSE, "marker": "*", "markersize": 10, "linestyle": "none"}
                style |= {} if tuned else {"markerfacecolor": "white"}
                extra[name] = line_handle(name, **style)
            else:
                used[key] = all_looks[key]
                style = all_looks[key].style | {"linestyle": "none"}
            axes.plot(points[column], points["accuracy"], **style, zorder=3)
            bars = {"fmt": "none", "ecolor": style["color"], "elinewidth": 0.8, "alpha": 0.35, "zorder": 1}
            axes.errorbar(points[column], points["accuracy"], points["accuracy_error"], **bars)
        x, y = here[column].to_numpy(float), here["accuracy"].to_numpy(float)
        front = pareto_front(x, y)
        style = {"color": RULE, "linewidth": 1.2, "linestyle": "-"}
        axes.step(x[front], y[front], where="pre", **style, zorder=2)
        extra["Pareto front, with sparsity in %"] = line_handle("Pareto front, with sparsity in %", **style)
        axes.margins(0.08, 0.12)
        axes.set_ylim(bottom=max(axes.get_ylim()[0], -0.02))
        _label(axes, x[front], y[front], here["sparsity_percent"].to_numpy(float)[front])
        return True

    note = "More is better in both. Bars: ± 1 standard error. Device and batch: see the protocol."
    heading = f"Accuracy against {speed}" + (f"\n{title}" if title else "")
    labels = (unit, "accuracy")
    return Sheet(known).draw(
        draw, heading, note, labels, lambda: legend_entries(used, all_looks, points=True) + list(extra.values())
    )


def _label(axes: Axes, x: np.ndarray, y: np.ndarray, percent: np.ndarray) -> None:
    """Sparsities right above the front's points; one that would touch its neighbour's label is left out."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    placed: list[tuple[float, float]] = []
    for px, py, level in zip(x, y, percent, strict=True):
        at = ((px - left) / (right - left), (py - low) / (high - low))
        if all(abs(at[0] - other[0]) > 1.4 * _NEAR or abs(at[1] - other[1]) > 1.4 * _NEAR for other in placed):
            placed.append(at)
            axes.annotate(f"{level:g}", (px, py), (3, 5), textcoords="offset points", fontsize=7.5, color="#333333")

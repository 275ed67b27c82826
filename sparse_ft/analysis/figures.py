"""Curves against sparsity: one panel a (model, task), lines by method and mode."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from sparse_ft.analysis.panels import Sheet
from sparse_ft.analysis.performance import chance_level, dense_baseline, majority_level
from sparse_ft.analysis.style import DENSE, RULE, Look, line_handle, looks
from sparse_ft.settings import modes

__all__ = ["CHARTS", "Chart", "curve_figure", "legend_entries"]


@dataclass(frozen=True)
class Chart:
    """What one figure of curves shows.

    ``column`` of the performance table against sparsity; ``error`` the column of its standard error, or of
    its deviation over seeds; ``before`` the column measured before tuning; ``factor`` multiplies for
    display; ``dense`` and ``chance`` draw those levels as rules, ``rules`` adds (height, label). ``from_zero``
    begins the axis at 0, for speeds: cut off, a few per cent of noise look like a result.
    """

    name: str
    title: str
    label: str
    column: str
    error: str | None = None
    before: str | None = None
    log: bool = False
    factor: float = 1.0
    dense: bool = False
    chance: bool = False
    rules: tuple[tuple[float, str], ...] = ()
    note: str = ""
    from_zero: bool = False


_ERRORS = "Bands: ± 1 standard error (questions scored or windows read; seeds where there are several)."
_BOTH = "Bands: ± 1 standard error of two independent scores; they share questions, so it is less."
_SEEDS = "Bands: ± 1 standard deviation over seeds, where there are several."
CHARTS: tuple[Chart, ...] = (
    Chart("accuracy", "Accuracy after fine-tuning", "accuracy", "accuracy", "accuracy_error", "accuracy_untuned",
          dense=True, chance=True, note=_ERRORS),
    Chart("loss", "Loss on the answers after fine-tuning", "loss (nats per token)", "loss", "loss_error",
          "loss_untuned", dense=True, note=_ERRORS),
    Chart("perplexity", "Perplexity of held-out text after fine-tuning", "perplexity (log scale)", "perplexity",
          "perplexity_error", "perplexity_untuned", log=True, dense=True, note=_ERRORS),
    Chart("recovery", "Recovery: share of the dense fine-tuned accuracy", "recovery (%)", "recovery",
          "recovery_error", factor=100, rules=((100, "dense, fine-tuned"), (95, "95 %")), note=_BOTH),
    Chart("training_throughput", "Training throughput", "tokens per second", "train_tokens_per_second",
          "train_tokens_per_second_std", dense=True, note=_SEEDS, from_zero=True),
    Chart("evaluation_throughput", "Evaluation throughput", "samples per second", "eval_samples_per_second",
          "eval_samples_per_second_std", dense=True, note=_SEEDS, from_zero=True),
    Chart("measured_speed", "Measured speed of writing, in the fastest form", "tokens per second, 8 at once",
          "measured_tokens_per_second", "measured_tokens_per_second_std", dense=True, note=_SEEDS, from_zero=True),
    Chart("measured_size", "Measured size on disk, in the smallest form", "MB", "measured_bytes", factor=1e-6,
          dense=True, from_zero=True),
    Chart("accuracy_gained", "Accuracy that fine-tuning gained over the pruned model", "gain (points)",
          "accuracy_gained", "accuracy_gained_error", factor=100, rules=((0, "no gain"),), note=_BOTH),
    Chart("perplexity_gained", "Perplexity before fine-tuning over after", "ratio (log scale)",
          "perplexity_ratio_gained", "perplexity_ratio_gained_error", log=True, rules=((1, "no gain"),), note=_BOTH),
    Chart("remasking_gap_accuracy", "Accuracy lost by masking the merged model again", "loss (points)",
          "accuracy_remask_gap", "accuracy_remask_gap_error", factor=100, rules=((0, "no loss"),), note=_BOTH),
    Chart("remasking_gap_perplexity", "Perplexity of the merged model after masking it again, over before",
          "ratio (log scale)", "perplexity_ratio_remask", "perplexity_ratio_remask_error", log=True,
          rules=((1, "no loss"),), note=_BOTH),
)  # fmt: skip


def curve_figure(chart: Chart, cells: pd.DataFrame, table: pd.DataFrame, title: str = "") -> Figure | None:
    """The figure of ``chart``, or None where nothing of it was measured.

    ``cells`` gives the chance level, ``table`` is the performance table: lines are its means.
    """
    column = pd.to_numeric(table[chart.column], errors="coerce")
    usable = np.isfinite(column) & (table["series"] != modes.DENSE.label)
    usable &= (column > 0) if chart.log else True
    if not usable.any():
        return None
    shown = table[usable]
    all_looks = looks(table)
    used: dict[tuple[str, str, str], Look] = {}
    rules: dict[str, Line2D] = {}

    def draw(axes: Axes, model: str, task: str) -> bool:
        lines = shown[(shown["model"] == model) & (shown["task"] == task)]
        groups = lines.groupby(["series", "variant", "mode"], sort=False)
        drawn = False
        for key, line in groups:
            if _draw_line(axes, chart, line, all_looks[key], len(groups) <= 4, rules):
                used[key] = all_looks[key]
                drawn = True
        if drawn:
            _draw_rules(axes, chart, cells, table, (model, task), rules)
            _finish(axes, chart)
        return drawn

    sheet = Sheet(shown)
    heading = f"{chart.title}\n{title}" if title else chart.title
    labels = ("sparsity of the prunable weights (%)", chart.label)
    return sheet.draw(draw, heading, chart.note, labels, lambda: legend_entries(used, all_looks) + list(rules.values()))


def _draw_line(axes: Axes, chart: Chart, line: pd.DataFrame, look: Look, few: bool, rules: dict[str, Line2D]) -> bool:
    line = line.sort_values("sparsity_percent")
    x, y = line["sparsity_percent"].to_numpy(float), line[chart.column].to_numpy(float) * chart.factor
    keep = np.isfinite(y) & ((y > 0) if chart.log else True)
    if not keep.any():
        return False
    axes.plot(x[keep], y[keep], **look.style, zorder=3)
    if chart.error in line and look.lines:
        error = line[chart.error].to_numpy(float) * chart.factor
        banded = keep & np.isfinite(error)
        low = y - error
        low = np.maximum(low, y * 1e-3) if chart.log else low
        if banded.sum() == 1:  # a band needs two points
            axes.errorbar(x[banded], y[banded], error[banded], color=look.colour, capsize=3, linewidth=1, zorder=2)
        axes.fill_between(x[banded], low[banded], (y + error)[banded], color=look.colour, alpha=0.13, linewidth=0)
    if few and chart.before in line and look.lines:
        before = line[chart.before].to_numpy(float) * chart.factor
        known = np.isfinite(before) & ((before > 0) if chart.log else True)
        if known.any():
            style = {"color": look.colour, "linestyle": (0, (1, 1.6)), "marker": "x", "linewidth": 1.1}
            axes.plot(x[known], before[known], **style, zorder=2)
            if (error := f"{chart.error}_untuned") in line:
                bars = {"fmt": "none", "ecolor": look.colour, "elinewidth": 0.8, "alpha": 0.45, "zorder": 1}
                axes.errorbar(x[known], before[known], line[error].to_numpy(float)[known] * chart.factor, **bars)
            rules["before"] = line_handle("before fine-tuning", **(style | {"color": RULE}))
    return True


def _draw_rules(
    axes: Axes, chart: Chart, cells: pd.DataFrame, table: pd.DataFrame, panel: tuple[str, str], rules: dict[str, Line2D]
) -> None:
    model, task = panel
    for place, (height, label) in enumerate(chart.rules):
        style = {"color": DENSE if place == 0 else RULE, "linewidth": 1.0, "linestyle": "-" if place == 0 else "-."}
        axes.axhline(height, **style, zorder=1)
        rules[label] = line_handle(label, **style)
    variants = table.loc[(table["model"] == model) & (table["task"] == task), "variant"].unique()
    panel = (table, model, task, variants[0] if len(variants) == 1 else "")
    tuned = dense_baseline(*panel)
    base = dense_baseline(*panel, tuned=False) if tuned is None else tuned
    if chart.dense and base is not None and np.isfinite(base[chart.column]):
        style = {"color": DENSE, "linewidth": 1.1, "linestyle": "-"}
        height, error = base[chart.column] * chart.factor, base.get(chart.error or "", math.nan) * chart.factor
        axes.axhline(height, **style, zorder=1)
        if np.isfinite(error):
            axes.axhspan(height - error, height + error, color=DENSE, alpha=0.07, linewidth=0, zorder=0)
        scored = chart.column in ("accuracy", "loss", "perplexity")
        name = "dense, fine-tuned" if scored and tuned is not None else modes.DENSE.label
        rules[name] = line_handle(name, **style)
    levels = {"chance": chance_level(cells, task), "always the commonest answer": majority_level(cells, task)}
    for label, height in levels.items():
        if chart.chance and height is not None:
            style = {"color": RULE, "linewidth": 1.1, "linestyle": ":" if label == "chance" else "-."}
            axes.axhline(height, **style, zorder=1)
            rules[label] = line_handle(label, **style)


def legend_entries(
    used: Mapping[tuple[str, str, str], Look], order: Mapping[tuple[str, str, str], Look], points: bool = False
) -> list[Line2D]:
    """Legend entries in the order of the table; the points of a search share theirs.

    ``points``: without the lines, for scattered points.
    """
    handles: dict[str, Line2D] = {}
    for key in order:
        if key in used:
            series, variant, mode = key
            parts = [series, f"({variant})" if variant and used[key].lines else "", modes.mode_label(mode)]
            label = " · ".join(part for part in parts if part)
            style = used[key].style | ({"linestyle": "none"} if points else {})
            handles.setdefault(label, line_handle(label, **style))
    return list(handles.values())


def _finish(axes: Axes, chart: Chart) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True))
    if chart.log and axes.lines:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        decades = math.log10(high / low)
        # Powers of ten alone would leave a narrow range without a label.
        few = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]) if decades < 0.8 else None
        axes.yaxis.set_major_locator(few or LogLocator(10, subs=(1.0,) if decades > 3 else (1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if chart.from_zero:
        axes.set_ylim(0, 1.06 * axes.dataLim.ymax)  # the margin of the cut-off axis would cut the topmost markers
    if chart.chance:  # an accuracy: there is nothing below 0, also where all of them are 0
        axes.set_ylim(bottom=max(axes.get_ylim()[0], -0.02))
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, -2), max(right, 2))

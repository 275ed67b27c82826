"""Heatmaps: method by sparsity for every task and mode; and the sparsity of layers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from sparse_ft.analysis.panels import Sheet, short_names
from sparse_ft.analysis.style import LEVEL_COLOURS, line_handle
from sparse_ft.analysis.table import NO_METHOD, series_label
from sparse_ft.settings.modes import DENSE, mode_label
from sparse_ft.settings.rules import STEPS, rule_label
from sparse_ft.tracking.record import Run, Tag, by_level

__all__ = ["heatmap_figure", "layer_figure"]

_CELL_WIDTH, _CELL_HEIGHT = 0.52, 0.32  # inches


def heatmap_figure(table: pd.DataFrame, title: str = "") -> Figure | None:
    """Accuracy by method and sparsity, one map a (model, task) and mode; None without any accuracy.

    The maps of a task share their colours; a cell without a score is crossed out.
    """
    known = table[(table["series"] != DENSE.label) & table["accuracy"].notna() & (table["variant"] == "")]
    if known.empty:
        return None
    # Methods and levels as the study has them, so that maps line up and holes are seen.
    series = known["series"].drop_duplicates().tolist()
    levels = sorted(known["sparsity_percent"].unique())
    modes = known["mode"].drop_duplicates().tolist()
    rows = known[["model", "task"]].drop_duplicates().values.tolist()
    names = short_names(known["model"].drop_duplicates().tolist())
    titles = {
        (model, task, mode): f"{task} · {names[model]} · {mode_label(mode)}" for model, task in rows for mode in modes
    }
    map_width = max(len(levels) * _CELL_WIDTH, 0.078 * max(map(len, titles.values())))
    map_height = max(len(series) * _CELL_HEIGHT, 0.45)
    left = 0.25 + 0.075 * max(map(len, series))
    gap_x, gap_y, bar, top, bottom = 0.35, 0.48, 0.95, 1.1 if title else 0.88, 0.55
    width = left + len(modes) * map_width + (len(modes) - 1) * gap_x + bar
    height = top + len(rows) * map_height + (len(rows) - 1) * gap_y + bottom
    figure = Figure(figsize=(width, height))
    heading = "Accuracy by method and sparsity (%)" + (f"\n{title}" if title else "")
    figure.text(0.12 / width, 1 - 0.1 / height, heading, va="top", fontsize=11, fontweight="bold")
    worst = known["accuracy_error"].max()
    note = "× no score." + (f" Standard errors are up to {worst:.3f}." if worst > 0 else "")
    figure.text(0.12 / width, 0.1 / height, note, fontsize=7.5, color="#555555")
    for r, (model, task) in enumerate(rows):
        of_task = known.loc[known["task"] == task, "accuracy"]
        scale = Normalize(of_task.min(), of_task.max() if of_task.max() > of_task.min() else of_task.min() + 1e-6)
        y = height - top - (r + 1) * map_height - r * gap_y
        for c, mode in enumerate(modes):
            x = left + c * (map_width + gap_x)
            axes = figure.add_axes((x / width, y / height, map_width / width, map_height / height))
            here = known[(known["model"] == model) & (known["task"] == task) & (known["mode"] == mode)]
            values = _grid(here, series, levels)
            _paint(axes, values, scale)
            axes.set_title(titles[model, task, mode], loc="left", fontsize=9)
            axes.set_yticks(range(len(series)), series if c == 0 else [""] * len(series))
            axes.set_xticks(range(len(levels)), [f"{level:g}" for level in levels], fontsize=8)
        x = left + len(modes) * map_width + (len(modes) - 1) * gap_x + 0.15
        bar_axes = figure.add_axes((x / width, y / height, 0.12 / width, map_height / height))
        colours = figure.colorbar(ScalarMappable(scale, LEVEL_COLOURS), cax=bar_axes)
        ticks = np.linspace(scale.vmin, scale.vmax, 3 if scale.vmax - scale.vmin > 0.02 else 1)
        colours.set_ticks(ticks, labels=[f"{value:.2f}" for value in ticks])
        colours.ax.tick_params(labelsize=7.5)
        colours.outline.set_linewidth(0.5)
    return figure


def layer_figure(runs: Iterable[Run], title: str = "") -> Figure | None:
    """Sparsity of every block, a line a level, one panel a model and method; None where no run says it."""
    records = []
    for run in runs:
        params = run.params
        model = str(params.get("cfg/model") or "model")
        about = [params.get(f"cfg/{name}") for name in ("method", "importance", "scope")]
        steps = {step: params.get(f"cfg/{step}") for step in STEPS}
        label = series_label(about[0] or "unknown", rule_label(about[1] or NO_METHOD, steps))
        label = " ".join(part for part in (label, about[2]) if part and part != NO_METHOD)
        for level, blocks in by_level(run.tags, Tag.BLOCK_SPARSITY).items():
            records.append({"model": model, "task": label, "level": level, "blocks": json.loads(blocks)})
    if not records:
        return None
    frame = pd.DataFrame(records).sort_values(["model", "task", "level"], kind="stable").drop_duplicates(
        ["model", "task", "level"])  # fmt: skip
    levels = sorted(frame["level"].unique())
    colours = matplotlib.colormaps[LEVEL_COLOURS]
    shades = {level: colours(0.9 * place / max(len(levels) - 1, 1)) for place, level in enumerate(levels)}

    def draw(axes: Axes, model: str, method: str) -> bool:
        here = frame[(frame["model"] == model) & (frame["task"] == method)]
        for entry in here.to_dict("records"):
            values = [100 * value for value in entry["blocks"]]
            marker = "o" if len(values) <= 40 else None
            axes.plot(range(len(values)), values, color=shades[entry["level"]], marker=marker, markersize=3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(-3, 103)
        return len(here) > 0

    entries = [line_handle(f"{100 * level:g} %", color=shades[level], marker="o", markersize=3) for level in levels]
    heading = "Sparsity of the blocks" + (f"\n{title}" if title else "")
    return Sheet(frame).draw(draw, heading, "Each line is one mask set; the legend says the sparsity asked for.",
                             ("block", "sparsity (%)"), lambda: entries)  # fmt: skip


def _grid(here: pd.DataFrame, series: list[str], levels: list[float]) -> np.ndarray:
    values = np.full((len(series), len(levels)), math.nan)
    for name, level, accuracy in zip(here["series"], here["sparsity_percent"], here["accuracy"], strict=True):
        values[series.index(name), levels.index(level)] = accuracy
    return values


def _paint(axes: Axes, values: np.ndarray, scale: Normalize) -> None:
    colours = matplotlib.colormaps[LEVEL_COLOURS]
    axes.imshow(np.ma.masked_invalid(values), cmap=LEVEL_COLOURS, norm=scale, aspect="auto")
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for (r, c), value in np.ndenumerate(values):
        if math.isnan(value):
            axes.text(c, r, "×", ha="center", va="center", color="#999999", fontsize=9)
            continue
        red, green, blue, _ = colours(scale(value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(c, r, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color="white" if dark else "black")

"""What a search shows: its trials as a figure and as a table of the best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial
from rich.box import SIMPLE_HEAD
from rich.table import Table

from sparse_ft.files import atomic_path
from sparse_ft.levels import level_label
from sparse_ft.settings.search import SearchSettings

__all__ = ["best_table", "plot_trials"]


def plot_trials(
    path: Path, trials: Sequence[FrozenTrial], best: Sequence[FrozenTrial], settings: SearchSettings
) -> Path:
    """One objective: every trial's value and the best so far. Two: accuracy against sparsity, with the front."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    if len(settings.metrics) == 1:
        numbers, values = [trial.number for trial in trials], [trial.values[0] for trial in trials]
        pick = min if settings.directions[0] == "minimize" else max
        so_far = [pick(values[: end + 1]) for end in range(len(values))]
        axes.plot(numbers, values, "o", color="0.55", label="trial")
        axes.step(numbers, so_far, where="post", color="C0", label="best so far")
        axes.set(xlabel="trial", ylabel=settings.metrics[0])
    else:
        for chosen, style, colour, label in ((trials, "o", "0.55", "trial"), (best, "o-", "C0", "Pareto front")):
            accuracy, sparsity = [t.values[0] for t in chosen], [100 * t.values[1] for t in chosen]
            axes.plot(sparsity, accuracy, style, color=colour, label=label)
        axes.set(xlabel="sparsity after the merge, %", ylabel="accuracy")
    axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path


def best_table(best: Sequence[FrozenTrial], settings: SearchSettings) -> Table:
    """The best trials with their values and what was chosen for them."""
    title = "best trial" if len(settings.metrics) == 1 else "Pareto front"
    table = Table("trial", *settings.metrics, *settings.space, title=title, title_justify="left", box=SIMPLE_HEAD)
    for trial in best:
        measured = zip(settings.metrics, trial.values, strict=True)
        values = [f"{100 * value:.1f} %" if "sparsity" in name else f"{value:.4f}" for name, value in measured]
        chosen = [_shown(name, trial.params.get(name)) for name in settings.space]
        table.add_row(str(trial.number), *values, *chosen)
    return table


def _shown(name: str, value: Any) -> str:
    if name == "sparsity":
        return f"{level_label(value)} %"
    return f"{value:.3g}" if isinstance(value, float) else str(value)

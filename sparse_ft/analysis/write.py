"""All files of an analysis: tables, figures, protocol and the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from sparse_ft.analysis.answer import ENOUGH, Signal, one_sentence, signals
from sparse_ft.analysis.baselines import compare_baseline, load_baseline
from sparse_ft.analysis.beside import beside_cells, beside_points, compared_beside
from sparse_ft.analysis.figures import CHARTS, Chart, curve_figure
from sparse_ft.analysis.holes import holes, protocols
from sparse_ft.analysis.maps import heatmap_figure, layer_figure
from sparse_ft.analysis.pareto import measured_pareto, pareto_figure
from sparse_ft.analysis.performance import curves, performance_table
from sparse_ft.analysis.report import ReportFigure, ReportParts, report_html
from sparse_ft.analysis.sentences import Sentence, answers
from sparse_ft.analysis.spreadsheet import csv_text
from sparse_ft.analysis.style import drawing, save_figure
from sparse_ft.analysis.table import MEAN, cell_table, grouped_table
from sparse_ft.files import write_json, write_text
from sparse_ft.progress import SILENT, Progress
from sparse_ft.tracking.record import Run

__all__ = ["AnalysisResult", "write_analysis"]

_CAPTIONS = {
    "accuracy": "Mean over seeds; the thin black line is dense fine-tuning, the dotted one guessing.",
    "loss": "Negative log-likelihood of the right answers, per token. Lower is better.",
    "perplexity": "Perplexity of the text that the protocol names, at its sequence length. Lower is better.",
    "recovery": "100 % is the accuracy that dense fine-tuning reaches under the same protocol.",
    "training_throughput": "Tokens without padding, first steps left out, on the device that the protocol names.",
    "evaluation_throughput": "Questions scored per second, on the device and batch that the protocol names.",
    "measured_speed": "Tokens written per second at batch 8, in the fastest form that masks and machine allow.",
    "measured_size": "Bytes of the files of weights, in the smallest form: dense, shrunk or packed.",
    "accuracy_gained": "Accuracy after fine-tuning less that of the pruned model before, in points.",
    "perplexity_gained": "How many times lower fine-tuning made the perplexity of the pruned model.",
    "remasking_gap_accuracy": "Points lost when a model merged from a dense adapter is made sparse again.",
    "remasking_gap_perplexity": "How many times higher the perplexity is once that merged model is masked again.",
    "pareto": "Cells that no other one beats in both accuracy and throughput form the front.",
    "pareto_measured": "The same with the measured speed of writing, each model in its fastest form.",
    "heatmaps": "Methods by sparsity; the maps of a task share their colours.",
    "beside_accuracy": "Each task by the metric that the protocol names, and their mean, each task counting once.",
    "beside_recovery": "100 % is what the dense fine-tuned model reaches on the same task.",
    "beside_accuracy_gained": "What fine-tuning on one task did to the others, in points.",
    "beside_remasking_gap_accuracy": "Points lost when a model merged from a dense adapter is made sparse again.",
    "beside_heatmaps": "Methods by sparsity, task by task; the maps of a task share their colours.",
    "layer_sparsity": "Where the zeros are: sparsity block by block, for each level asked for.",
}  # fmt: skip


@dataclass
class AnalysisResult:
    """What an analysis wrote and found.

    Attributes:
        files: every file written.
        figures: the PNGs among them, by name.
        skipped: figures that were not drawn, and why.
        sentences: the answers, one a model and task.
        answer: the study in one sentence; empty where it is of several models or tasks.
        signals: how far the dense model stands above guessing, task by task.
        cells: the table behind ``summary.csv``.
        points: the table behind ``sparsity_vs_performance.csv``.
        holes: the table behind ``holes.csv``.
        curves: for the curve runs; see `sparse_ft.analysis.performance.curves`.
        beside: the table behind ``scores.csv``: points on the tasks scored beside; empty where none were.
        baseline: ``joined`` and ``not_comparable``, where a baseline was asked for.
        report: the page.
    """

    files: list[Path] = field(default_factory=list)
    figures: dict[str, Path] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    sentences: list[Sentence] = field(default_factory=list)
    answer: str = ""
    signals: list[Signal] = field(default_factory=list)
    cells: pd.DataFrame = field(default_factory=pd.DataFrame)
    points: pd.DataFrame = field(default_factory=pd.DataFrame)
    beside: pd.DataFrame = field(default_factory=pd.DataFrame)
    holes: pd.DataFrame = field(default_factory=pd.DataFrame)
    curves: list[dict[str, Any]] = field(default_factory=list)
    baseline: dict[str, pd.DataFrame] | None = None
    report: Path | None = None


def write_analysis(
    runs: Iterable[Run],
    output_dir: str | Path,
    baseline: str | Path | None = None,
    title: str = "",
    expected: Iterable[Mapping[str, Any]] | None = None,
    progress: Progress = SILENT,
    figures: bool = True,
) -> AnalysisResult:
    """Writes all tables, figures and the page of a study into ``output_dir``.

    Args:
        runs: of the study; see `sparse_ft.analysis.table.cell_table`.
        output_dir: made where it does not exist; files of an earlier analysis are replaced.
        baseline: a CSV of published numbers, ``"builtin"`` for those of the package, or None.
        title: the study's name, over the page.
        expected: the plan's cells, for what was never started; see `sparse_ft.analysis.holes.holes`.
        progress: told the files written.
        figures: draw them; the page says that they were not asked for, otherwise.

    Raises:
        UserError: the baseline cannot be read; before anything is written.
    """
    runs, folder = list(runs), Path(output_dir)
    published = None if baseline is None else load_baseline(baseline)
    cells = cell_table(runs)
    grouped = grouped_table(cells)
    points = performance_table(cells, grouped)
    others = beside_cells(cells)
    beside = beside_points(others)
    result = AnalysisResult(cells=cells, points=points, beside=beside, holes=holes(cells, expected))
    result.curves = curves(cells, points, beside)
    result.sentences = answers(cells, points)
    if len(beside):
        result.sentences += answers(others[others["scored"] == MEAN], beside[beside["scored"] == MEAN])
    alone = others[others["scored"] != MEAN]
    result.signals = [*signals(cells, points), *signals(alone, beside)]
    told_apart = {signal.task for signal in result.signals if signal.errors >= ENOUGH}
    scored = pd.concat([points, beside]) if len(beside) else points
    result.answer = one_sentence(cells, points, scored[scored["task"].isin(told_apart)])
    protocol = protocols(cells)
    tables = {"summary": cells, "grouped_summary": grouped, "sparsity_vs_performance": points, "holes": result.holes}
    if len(beside):
        tables["scores"] = beside.dropna(axis=1, how="all")
    if published is not None:
        result.baseline = compared_beside(published, compare_baseline(published, cells, grouped), others)
        tables |= {"baseline_joined": result.baseline["joined"]}
        tables |= {"baseline_not_comparable": result.baseline["not_comparable"]}
    drawn = _drawings(runs, cells, points) | _drawings_beside(others, beside)
    progress.start("analysis", len(tables) + len(drawn) + 2, "files")
    for name, frame in tables.items():
        result.files.append(write_text(folder / f"{name}.csv", csv_text(frame)))
        progress.advance(note=f"{name}.csv")
    result.files.append(write_json(folder / "protocol.json", protocol))
    progress.advance(note="protocol.json")
    pictures = []
    for name, (heading, draw) in drawn.items():
        picture = _write_figure(result, folder / "figures", name, draw if figures else None)
        if picture is not None:
            pictures.append(ReportFigure(picture, heading, _CAPTIONS[name]))
        progress.advance(note=name)
    said = [*([result.answer] if result.answer else []), *(sentence.text for sentence in result.sentences)]
    said += map(str, result.signals)
    page = ReportParts(
        title, cells, points, result.holes, protocol, said, pictures,
        {drawn[name][0]: why for name, why in result.skipped.items()}, result.baseline, beside,
    )  # fmt: skip
    result.report = write_text(folder / "report.html", report_html(page))
    result.files.append(result.report)
    progress.advance(note="report.html")
    progress.stop()
    return result


def _drawings(
    runs: Sequence[Run], cells: pd.DataFrame, points: pd.DataFrame
) -> dict[str, tuple[str, Callable[[], Figure | None]]]:
    """Every figure: its file's name, its heading on the page, and how it is drawn."""
    drawn: dict[str, tuple[str, Callable[[], Figure | None]]] = {
        chart.name: (chart.title, lambda chart=chart: curve_figure(chart, cells, points)) for chart in CHARTS
    }
    drawn["pareto"] = ("Accuracy against throughput", lambda: pareto_figure(points))
    drawn["pareto_measured"] = ("Accuracy against measured speed", lambda: measured_pareto(points))
    drawn["heatmaps"] = ("Accuracy by method and sparsity", lambda: heatmap_figure(points))
    drawn["layer_sparsity"] = ("Sparsity of the blocks", lambda: layer_figure(runs))
    return drawn


def _drawings_beside(cells: pd.DataFrame, points: pd.DataFrame) -> dict[str, tuple[str, Callable[[], Figure | None]]]:
    """The same of the tasks scored beside, where there are any."""
    if points.empty:
        return {}

    def drawn(chart: Chart) -> tuple[str, Callable[[], Figure | None]]:
        heading = f"{chart.title}, on the tasks scored beside"
        return heading, lambda: curve_figure(replace(chart, title=heading), cells, points)

    charts = {f"beside_{chart.name}": drawn(chart) for chart in CHARTS if f"beside_{chart.name}" in _CAPTIONS}
    heading = "Accuracy by method and sparsity, on the tasks scored beside"
    return charts | {"beside_heatmaps": (heading, lambda: heatmap_figure(points))}


def _write_figure(
    result: AnalysisResult, folder: Path, name: str, draw: Callable[[], Figure | None] | None
) -> Path | None:  # fmt: skip
    """Draws and saves one figure; returns its SVG, or None where there was nothing to draw, or nobody asked for it."""
    with drawing():
        figure = draw() if draw else None
        if figure is None:
            result.skipped[name] = "not measured" if draw else "figures: none"
            for suffix in (".png", ".svg"):  # one of an earlier analysis would no longer be true
                (folder / f"{name}{suffix}").unlink(missing_ok=True)
            return None
        png, svg = save_figure(figure, folder, name)
    result.figures[name] = png
    result.files += [png, svg]
    return svg

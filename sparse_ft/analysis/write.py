"""All files of an analysis: tables, figures, protocol and the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from sparse_ft.analysis.figures import CHARTS, curve_figure
from sparse_ft.analysis.holes import holes, protocols
from sparse_ft.analysis.performance import curves, performance_table
from sparse_ft.analysis.sentences import Sentence, answers
from sparse_ft.analysis.style import drawing, save_figure
from sparse_ft.analysis.table import Row, cell_table, grouped_table
from sparse_ft.files import write_json, write_text
from sparse_ft.progress import SILENT, Progress

__all__ = ["AnalysisResult", "write_analysis"]


@dataclass
class AnalysisResult:
    """What an analysis wrote and found.

    Attributes:
        files: every file written.
        figures: the PNGs among them, by name.
        skipped: figures that were not drawn, and why.
        sentences: the answers, one a model and task.
        cells, holes: the tables behind ``summary.csv`` and ``holes.csv``.
        curves: for the curve runs; see `sparse_ft.analysis.performance.curves`.
    """

    files: list[Path] = field(default_factory=list)
    figures: dict[str, Path] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    sentences: list[Sentence] = field(default_factory=list)
    cells: pd.DataFrame = field(default_factory=pd.DataFrame)
    holes: pd.DataFrame = field(default_factory=pd.DataFrame)
    curves: list[dict[str, Any]] = field(default_factory=list)


def write_analysis(
    rows: Iterable[Row],
    output_dir: str | Path,
    title: str = "",
    expected: Iterable[Mapping[str, Any]] | None = None,
    progress: Progress = SILENT,
) -> AnalysisResult:
    """Writes all tables and figures of a study into ``output_dir``.

    Args:
        rows: run records as tracking hands them over; see `sparse_ft.analysis.table.cell_table`.
        output_dir: made where it does not exist; files of an earlier analysis are replaced.
        title: the question, or the study's name.
        expected: the plan's cells, for what was never started; see `sparse_ft.analysis.holes.holes`.
        progress: told the files written.
    """
    folder = Path(output_dir)
    cells = cell_table(rows)
    grouped = grouped_table(cells)
    table = performance_table(cells, grouped)
    missing = holes(cells, expected)
    result = AnalysisResult(cells=cells, holes=missing, curves=curves(cells, table), sentences=answers(cells, table))
    tables = {"summary": cells, "grouped_summary": grouped, "sparsity_vs_performance": table, "holes": missing}
    progress.start("analysis", len(tables) + len(CHARTS) + 1)
    for name, frame in tables.items():
        result.files.append(write_text(folder / f"{name}.csv", frame.to_csv(index=False)))
        progress.advance(note=f"{name}.csv")
    result.files.append(write_json(folder / "protocol.json", protocols(cells)))
    progress.advance(note="protocol.json")
    with drawing():
        for chart in CHARTS:
            figure = curve_figure(chart, cells, table, title)
            if figure is None:
                result.skipped[chart.name] = "not measured"
            else:
                paths = save_figure(figure, folder / "figures", chart.name)
                result.figures[chart.name] = paths[0]
                result.files += paths
            progress.advance(note=chart.name)
    progress.stop()
    return result

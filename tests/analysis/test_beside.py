"""Tasks scored beside the trained one: each a row of its own, and their mean, in tables, figures, curves and words."""

import pandas as pd
import pytest
from synthetic import cell, study

from sparse_ft.analysis.beside import beside_cells, beside_points, wide_points
from sparse_ft.analysis.figures import CHARTS, curve_figure
from sparse_ft.analysis.maps import heatmap_figure
from sparse_ft.analysis.performance import curves, performance_table
from sparse_ft.analysis.table import cell_table, grouped_table, scored_names
from sparse_ft.analysis.terminal import scores_tables, table_text
from sparse_ft.analysis.write import write_analysis

NAMES = ("arc_easy", "boolq", "hellaswag", "piqa")


def scored(run, names=NAMES, metric="acc", shift=0.0):
    """The run with scores on other tasks, and what they depend on."""
    mean = 0.0
    for number, name in enumerate(names):
        accuracy = 0.3 + 0.1 * number + 0.3 * (1 - float(run.params["cfg/sparsity"])) + shift
        mean += accuracy / len(names)
        for after, value in (("", accuracy), ("_untuned", accuracy - 0.05)):
            run.metrics[f"eval/{name}/accuracy{after}"] = run.metrics[f"eval/{name}/acc{after}"] = value
            run.metrics[f"eval/{name}/accuracy_stderr{after}"] = 0.01
        run.params[f"protocol/score/{name}"] = (
            f"accuracy_metric={metric}; num_fewshot=0; split=test; limit=none; chance=0.25"
        )
    for after, value in (("", mean), ("_untuned", mean - 0.05)):
        run.metrics[f"eval/mean_accuracy{after}"], run.metrics[f"eval/mean_accuracy_stderr{after}"] = value, 0.005
    return run


@pytest.fixture(scope="module")
def runs():
    made = study(("synthetic-a",), ("boolq",), ("unstructured", "structured"), (0.3, 0.5, 0.7))
    return [scored(run) if run.kind == "cell" else run for run in made]


def test_each_task_is_a_row_and_the_mean_too(runs):
    cells = cell_table(runs)
    assert scored_names(cells) == list(NAMES) and cells["mean_accuracy"].dtype == float
    rows = beside_cells(cells)
    assert len(rows) == len(cells) * 5 and set(rows["task"]) == {"mean", *NAMES}
    piqa = rows[(rows["task"] == "piqa") & (rows["sparsity"] == 0.5)].iloc[0]
    assert piqa["accuracy"] == pytest.approx(0.75) and piqa["accuracy_stderr_untuned"] == 0.01
    assert (piqa["trained"], piqa["protocol_accuracy_metric"], piqa["protocol_chance"]) == ("boolq", "acc", "0.25")
    assert rows["perplexity"].isna().all() and rows["loss_untuned"].isna().all()
    # The cells' own scores are what they were.
    assert cells.loc[cells["sparsity"] == 0.5, "accuracy"].tolist() != [0.75] * 4


def test_recovery_is_of_the_same_task(runs):
    rows = beside_cells(cell_table(runs))
    points = beside_points(rows)
    one = points[(points["scored"] == "piqa") & (points["sparsity"] == 0.5)].iloc[0]
    dense = points[(points["scored"] == "piqa") & (points["mode"] == "dense")].iloc[0]
    assert one["recovery"] == pytest.approx(one["accuracy"] / dense["accuracy"]) and one["recovery_reason"] == ""
    assert one["accuracy_gained"] == pytest.approx(0.05) and set(points["trained"]) == {"boolq"}
    wide, names = wide_points(points)
    assert names == ["mean", *NAMES] and len(wide) == len(cell_table(runs))
    row = wide[(wide["sparsity"] == 0.5)].iloc[0]
    assert row["mean"] == pytest.approx(sum(row[name] for name in NAMES) / 4) and row["mean untuned error"] == 0.005


def test_another_metric_is_another_protocol(runs):
    other = [scored(cell(sparsity=s, mode="dense" if s == 0 else "sparse_to_sparse"), metric="acc_norm" if s else "acc")
             for s in (0.0, 0.5)]  # fmt: skip
    points = beside_points(beside_cells(cell_table(other)))
    pruned = points[(points["scored"] == "piqa") & (points["sparsity"] == 0.5)].iloc[0]
    assert "accuracy_metric acc_norm, the baseline's acc" in pruned["recovery_reason"]


def test_several_trained_tasks_stay_apart():
    runs = [
        scored(cell(task=task, sparsity=s), shift=0.01 * (task == "gsm8k"))
        for task in ("boolq", "gsm8k")
        for s in (0.3, 0.5)
    ]
    points = beside_points(beside_cells(cell_table(runs)))
    assert {"piqa after boolq", "piqa after gsm8k", "mean after boolq"} <= set(points["task"])
    assert len(points) == 2 * 2 * 5


def test_figures_and_curves_are_drawn_of_them_as_of_cells(runs):
    cells = cell_table(runs)
    rows = beside_cells(cells)
    points = beside_points(rows)
    chart = next(chart for chart in CHARTS if chart.name == "accuracy")
    titles = [axes.get_title(loc="left") for axes in curve_figure(chart, rows, points).axes]
    assert titles == [f"{name} · synthetic-a" for name in sorted({"mean", *NAMES})]
    assert heatmap_figure(points) is not None
    lines = curves(cells, performance_table(cells, grouped_table(cells)), points)
    assert all(
        {"eval/mean_accuracy", "eval/piqa/accuracy", "eval/piqa/accuracy_untuned"} <= set(line["points"])
        for line in lines
    )
    line = next(line for line in lines if line["method"] == "structured" and line["mode"] == "sparse_to_sparse")
    assert dict(line["points"]["eval/piqa/accuracy"])[50] == pytest.approx(0.75)
    assert not any("piqa" in name for line in curves(cells) for name in line["points"])


@pytest.mark.slow
def test_the_analysis_has_them_everywhere(runs, tmp_path):
    result = write_analysis(runs, tmp_path, baseline="builtin")
    table = pd.read_csv(tmp_path / "scores.csv")
    assert len(table) == len(result.beside) == len(result.cells) * 5 and table["accuracy"].notna().all()
    drawn = {name for name in result.figures if name.startswith("beside_")}
    assert {"beside_accuracy", "beside_recovery", "beside_accuracy_gained", "beside_heatmaps"} <= drawn
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Tasks scored beside" in page and "The mean over the other tasks scored on synthetic-a keeps" in page
    assert "accuracy_metric=acc; num_fewshot=0" in page
    assert "piqa/accuracy" in pd.read_csv(tmp_path / "summary.csv").columns


def test_without_them_nothing_is_new(tmp_path):
    plain = write_analysis(study(("synthetic-a",), ("boolq",), ("unstructured",), (0.5,)), tmp_path, figures=False)
    assert plain.beside.empty and not (tmp_path / "scores.csv").exists()
    assert "scored beside" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert scores_tables([cell()]) == []


def test_the_terminal_has_a_column_a_task_and_cuts_nothing(runs):
    text = table_text(*scores_tables(runs))
    assert "0.750 ± 0.010" in text and "0.700 ± 0.010" in text and "mean" in text
    many = [scored(cell(sparsity=s), tuple(f"task_number_{n}" for n in range(12))) for s in (0.3, 0.5)]
    tables = scores_tables(many)
    assert len(tables) == 2 and table_text(*tables).count("±") == 2 * 2 * 13
    assert "…" not in table_text(*tables)


def test_scores_of_a_cell_whose_training_moved_nothing_are_the_untuned_ones():
    still = scored(cell(tags={"warning": "no_weight_moved: training changed no weight"}))
    table = cell_table([still])
    assert not {"piqa/accuracy", "mean_accuracy"} & set(table.columns)
    assert table["piqa/accuracy_untuned"].iloc[0] == pytest.approx(0.70)

"""The figures say what they should, at the full grid and at the demo's size, and nothing overlaps."""

import functools
import json

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from synthetic import cell, demo, study

from sparse_ft.analysis.figures import CHARTS, curve_figure
from sparse_ft.analysis.maps import heatmap_figure, layer_figure
from sparse_ft.analysis.pareto import measured_pareto, pareto_figure
from sparse_ft.analysis.performance import performance_table
from sparse_ft.analysis.style import drawing, looks, save_figure
from sparse_ft.analysis.table import cell_table, grouped_table
from sparse_ft.tracking.record import Run

NAMES = {chart.name: chart for chart in CHARTS}


@functools.cache
def tables(kind):
    long = ("mistralai/Mixtral-8x7B-Instruct-v0.1", "meta-llama/Llama-2-7b-chat-hf")
    rows = {
        "full": study,
        "demo": demo,
        "seeds": lambda: study(("a",), ("boolq",), seeds=(0, 1, 2)),
        "long": lambda: study(long, ("arc_challenge", "hellaswag"), ("semi_structured",), (0.5,)),
    }[kind]()
    cells = cell_table(rows)
    return cells, performance_table(cells, grouped_table(cells))


def mask_run(model="org/a", method="unstructured", levels=(0.5,), blocks=4):
    """A run of masks: blocks get sparser with depth."""
    tags = {
        f"block_sparsity_{100 * level:g}": json.dumps([level * (0.8 + 0.1 * block) for block in range(blocks)])
        for level in levels
    }
    params = {"cfg/model": model, "cfg/method": method, "cfg/importance": "magnitude", "cfg/scope": "global"}
    return Run(method, params=params, tags={"kind": "masks"} | tags)


def drawn(name, kind):
    cells, table = tables(kind)
    with drawing():
        if name == "pareto":
            return pareto_figure(table)
        if name == "pareto_measured":
            return measured_pareto(table)
        if name == "heatmaps":
            return heatmap_figure(table)
        if name == "layers":
            levels = [level / 10 for level in range(10)]
            return layer_figure([mask_run(method=method, levels=levels) for method in ("unstructured", "structured")])
        return curve_figure(NAMES[name], cells, table)


class Recorder(RendererAgg):
    """Draws, and remembers which text it drew (matplotlib keeps many tick labels that it never draws)."""

    def __init__(self, figure):
        super().__init__(figure.bbox.width, figure.bbox.height, figure.dpi)
        self.texts = []

    def draw_text(self, gc, x, y, s, prop, angle, ismath=False, mtext=None):
        super().draw_text(gc, x, y, s, prop, angle, ismath, mtext)
        self.texts.append((s, mtext.get_window_extent(self)))


def boxes(figure):
    """Every piece of text that shows, with its extent in pixels."""
    FigureCanvasAgg(figure)
    recorder = Recorder(figure)
    figure.draw(recorder)
    return recorder.texts


FULL = ("accuracy", "pareto", "heatmaps", "layers")  # other curves have the panels of the first
EVERY = (*NAMES, "pareto", "pareto_measured", "heatmaps", "layers")


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, "full") for n in FULL] + [(n, "demo") for n in EVERY] + [("accuracy", "long"), ("heatmaps", "long")],
)
def test_no_label_overlaps_another_or_leaves_the_figure(name, kind):
    with drawing():
        figure = drawn(name, kind)
        texts = boxes(figure)
    width, height = figure.bbox.width, figure.bbox.height
    assert len(texts) > 8
    for text, box in texts:
        assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1, f"{text!r} is cut"
    for place, (one, box) in enumerate(texts):
        for other, another in texts[place + 1 :]:
            overlap = (
                min(box.x1, another.x1) - max(box.x0, another.x0),
                min(box.y1, another.y1) - max(box.y0, another.y0),
            )
            assert min(overlap) <= 1, f"{one!r} lies on {other!r}"


@pytest.mark.parametrize("kind", ["full", "demo"])
def test_the_legend_is_outside_the_panels(kind):
    with drawing():
        figure = drawn("accuracy", kind)
        FigureCanvasAgg(figure).draw()
        legend = figure.legends[0].get_window_extent()
        assert not any(legend.overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_lines_are_the_measured_means():
    cells, table = tables("seeds")
    with drawing():
        axes = drawn("accuracy", "seeds").axes[0]
    expected = table[(table["series"] == "structured magnitude") & (table["mode"] == "sparse_to_sparse")]
    lines = [line for line in axes.lines if len(line.get_xdata()) == 10]
    matching = [line for line in lines if np.allclose(line.get_ydata(), expected["accuracy"])]
    assert len(matching) == 1
    assert list(matching[0].get_xdata()) == [10 * level for level in range(10)]
    scores = cells[(cells["series"] == "structured magnitude") & (cells["mode"] == "sparse_to_sparse")]
    assert np.allclose(matching[0].get_ydata(), scores.groupby("sparsity")["accuracy"].mean())


def test_rules_show_dense_and_chance():
    _, table = tables("demo")
    with drawing():
        figure = drawn("accuracy", "demo")
    dense = table.loc[table["mode"] == "dense", "accuracy"].item()
    heights = {float(line.get_ydata()[0]) for line in figure.axes[0].lines if len(line.get_xdata()) == 2
               and tuple(line.get_xdata()) == (0, 1)}  # fmt: skip
    assert heights == {dense, 0.5}
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"dense, fine-tuned", "chance", "before fine-tuning"} <= labels


def test_perplexity_is_logarithmic_and_leaves_infinity_out():
    rows = [*demo(), cell("smollm2-135m", sparsity=0.9, metrics={"eval/perplexity": float("inf")})]
    cells = cell_table(rows)
    with drawing():
        axes = curve_figure(NAMES["perplexity"], cells, performance_table(cells, grouped_table(cells))).axes[0]
    assert axes.get_yscale() == "log"
    assert all(np.isfinite(line.get_ydata()).all() for line in axes.lines)


def test_methods_keep_their_look_and_differ_in_grey():
    _, table = tables("full")
    found = looks(table)
    by_series = {series: {look.colour for key, look in found.items() if key[0] == series} for series, _, _ in found}
    assert all(len(colours) == 1 for colours in by_series.values())
    greys = sorted(np.dot(matplotlib.colors.to_rgb(next(iter(c))), (0.299, 0.587, 0.114)) for c in by_series.values())
    assert np.diff(greys).min() > 0.1  # printed in grey, methods still differ
    assert len({(look.marker, look.filled, look.dashes) for look in found.values()}) == len(found)


def test_nothing_measured_draws_nothing():
    cells = cell_table([cell(status="FAILED")])
    table = performance_table(cells, grouped_table(cells))
    assert all(curve_figure(chart, cells, table) is None for chart in CHARTS)
    assert pareto_figure(table) is None and heatmap_figure(table) is None and layer_figure([]) is None


def test_a_search_is_drawn_as_points():
    rows = [cell(sparsity=0.5 + i / 100, params={"cfg/learning_rate": str(rate)}, tags={"cell_key": f"{i}-{rate}"})
            for i in range(3) for rate in range(1, 7)]  # fmt: skip
    cells = cell_table(rows)
    table = performance_table(cells, grouped_table(cells))
    assert not any(look.lines for look in looks(table).values())
    with drawing():
        figure = curve_figure(NAMES["accuracy"], cells, table)
    assert len(figure.legends[0].get_texts()) <= 3


def test_heatmaps_cross_out_what_has_no_score():
    rows = [row for row in study(("a",), ("boolq",)) if "|structured|magnitude|0.4|sparse_to_sparse|" not in row.name]
    cells = cell_table(rows)
    with drawing():
        figure = heatmap_figure(performance_table(cells, grouped_table(cells)))
    marks = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert marks.count("×") == 1 and len(marks) == 60


def test_a_line_has_the_sparsity_of_each_block():
    with drawing():
        axes = layer_figure([mask_run(), Run("cell", tags={"kind": "cell"})]).axes[0]
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([40, 45, 50, 55])
    assert axes.get_title(loc="left") == "unstructured magnitude global · a"


def test_the_same_numbers_give_the_same_file(tmp_path):
    for name in ("one", "two"):
        with drawing():
            save_figure(drawn("loss", "demo"), tmp_path, name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"


def test_settings_of_others_are_left_alone():
    before = dict(matplotlib.rcParams)
    with drawing():
        drawn("loss", "demo")
    assert dict(matplotlib.rcParams) == before


def test_speeds_begin_at_zero_so_that_noise_does_not_look_like_a_result():
    for name in ("training_throughput", "evaluation_throughput"):
        panels = drawn(name, "full").axes
        assert {axes.get_ylim()[0] for axes in panels} == {0.0}
        # The topmost marker is whole.
        assert all(axes.get_ylim()[1] >= 1.05 * max(max(line.get_ydata()) for line in axes.lines) for axes in panels)


def test_a_measured_cell_is_shown_in_its_fastest_and_in_its_smallest_form():
    _, table = tables("demo")
    dense, sparse = table[table["mode"] == "dense"].iloc[0], table[table["mode"] != "dense"].iloc[0]
    level = sparse["sparsity"]
    assert sparse["measured_tokens_per_second"] == pytest.approx(40 + 10 * level)
    assert sparse["measured_bytes"] == pytest.approx(4e6 * (1.07 - level)) and dense["measured_bytes"] == 4e6
    unmeasured = table.assign(measured_tokens_per_second=np.nan)
    assert measured_pareto(unmeasured) is None and measured_pareto(table) is not None


def test_no_accuracy_below_zero_is_drawn_where_all_of_them_are_zero():
    nothing = {"eval/accuracy": 0.0, "eval/accuracy_stderr": 0.0}
    cells = cell_table([cell(task="gsm8k", sparsity=level, metrics=nothing) for level in (0.3, 0.6)])
    table = performance_table(cells, grouped_table(cells))
    with drawing():
        figure, heat = curve_figure(NAMES["accuracy"], cells, table), heatmap_figure(table)
        pareto = pareto_figure(table)
    assert min(axes.get_ylim()[0] for axes in (*figure.axes, *pareto.axes)) >= -0.02
    assert [label.get_text() for label in heat.axes[-1].get_yticklabels()] == ["0.00"]

import pandas as pd
from synthetic import demo

from sparse_ft.analysis.performance import performance_table
from sparse_ft.analysis.report import ReportFigure, ReportParts, report_html
from sparse_ft.analysis.sentences import Sentence
from sparse_ft.analysis.table import cell_table, grouped_table

BAD = "<script>alert('&')</script>"


def page(tmp_path, rows, holes=(), **changes):
    cells = cell_table(rows)
    points = performance_table(cells, grouped_table(cells))
    (tmp_path / "figure.svg").write_text('<svg width="400pt"></svg>')
    figures = [ReportFigure(tmp_path / "figure.svg", BAD, BAD)]
    parts = {"protocol": {"shared": {BAD: BAD}}, "sentences": [Sentence("model", "task", BAD)], "figures": figures}
    return report_html(ReportParts(BAD, cells, points, pd.DataFrame(holes), **(parts | changes)))


def test_nothing_of_a_study_is_markup(tmp_path):
    hole = {"method": BAD, "mode": BAD, "sparsity": 0.5, "model": BAD, "task": BAD, "reason": BAD, "message": BAD}
    shown = page(tmp_path, demo(), [hole | {"run_id": BAD}], skipped={BAD: BAD})
    assert BAD not in shown
    assert shown.count("&lt;script&gt;alert(&#39;&amp;&#39;)&lt;/script&gt;") == 17


def test_the_page_loads_nothing(tmp_path):
    shown = page(tmp_path, demo())
    assert "default-src 'none'" in shown
    assert "http://" not in shown and "https://" not in shown and 'src="data:image/svg+xml;base64,' in shown
    assert ".gallery" in shown and "makeSortable" in shown


def test_a_study_without_cells_is_a_page_too(tmp_path):
    shown = page(tmp_path, [], sentences=[], figures=[], protocol={})
    for said in ("has no cells", "No finished cell", "Nothing to draw", "No cell has finished", "no plan to compare"):
        assert said in shown
    assert "<table" not in shown

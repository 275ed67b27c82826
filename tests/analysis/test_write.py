import json
import re

import pandas as pd
import pytest
from synthetic import cell, demo, study
from test_figures import mask_run

from sparse_ft.analysis.write import write_analysis
from sparse_ft.errors import UserError
from sparse_ft.progress import Progress

TABLES = {"summary.csv", "grouped_summary.csv", "sparsity_vs_performance.csv", "holes.csv"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis")
    return folder, write_analysis([*demo(), mask_run()], folder, "builtin", "Demo")


@pytest.mark.slow
def test_all_files_are_there(written):
    folder, result = written
    names = {path.name for path in folder.iterdir()}
    assert TABLES | {"protocol.json", "report.html", "figures", "baseline_joined.csv",
                     "baseline_not_comparable.csv"} == names  # fmt: skip
    assert {path.suffix for path in (folder / "figures").iterdir()} == {".png", ".svg"}
    assert len(result.figures) == 16 and not result.skipped
    assert set(result.files) == {path for path in folder.rglob("*") if path.is_file()}


def test_the_tables_read_back(written):
    folder, result = written
    summary = pd.read_csv(folder / "summary.csv")
    assert len(summary) == 5
    assert summary["accuracy"].tolist() == pytest.approx(result.cells["accuracy"].tolist())
    assert summary["accuracy_remasked"].isna().sum() == 3  # what was not measured stays empty
    points = pd.read_csv(folder / "sparsity_vs_performance.csv")
    assert {"recovery", "accuracy_error", "perplexity", "sparsity_percent"} <= set(points)
    assert json.loads((folder / "protocol.json").read_text())["shared"]["num_fewshot"] == "0"


def test_the_page_holds_everything_and_points_nowhere(written):
    folder, result = written
    page = (folder / "report.html").read_text("utf-8")
    assert page.count("data:image/svg+xml;base64,") == 16
    assert result.sentences[0].text.split(" (")[0] in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in page


@pytest.mark.parametrize(
    ("rows", "notice"),
    [
        ([], "This study has no cells"),
        ([cell(status="FAILED"), cell(sparsity=0.7, status="RUNNING")], "No cell of this study has finished"),
        ([cell()], "This study has a single cell"),
        ([*demo(), cell("smollm2-135m", sparsity=0.9, status="FAILED")], "of this study have no result"),
    ],
    ids=["empty", "failed", "single", "half-failed"],
)
def test_incomplete_studies_give_a_page_that_says_so(tmp_path, rows, notice):
    nothing = not any(row.status == "FINISHED" for row in rows)
    result = write_analysis(rows, tmp_path, figures=nothing)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert notice in page
    assert {path.name for path in result.files} >= TABLES
    if nothing:
        assert not result.figures and "Nothing to draw" in page


@pytest.mark.slow
def test_a_figure_that_is_no_longer_true_goes(tmp_path):
    write_analysis(demo(), tmp_path)
    assert (tmp_path / "figures" / "recovery.png").exists()
    write_analysis([cell()], tmp_path)
    assert not (tmp_path / "figures" / "recovery.png").exists()
    assert (tmp_path / "figures" / "accuracy.png").exists()


def test_figures_that_nobody_asked_for_are_not_drawn_and_the_page_says_so(tmp_path):
    write_analysis([cell()], tmp_path)
    result = write_analysis([cell()], tmp_path, figures=False)
    assert not result.figures and not list((tmp_path / "figures").iterdir())
    assert len(result.skipped) == 16 and set(result.skipped.values()) == {"figures: none"}
    assert "Nothing to draw (figures: none)." in (tmp_path / "report.html").read_text("utf-8")


def test_a_wrong_baseline_stops_before_anything_is_written(tmp_path):
    with pytest.raises(UserError):
        write_analysis(demo(), tmp_path / "out", tmp_path / "nothing.csv")
    assert not (tmp_path / "out").exists()


def test_text_from_outside_is_escaped(tmp_path):
    hostile = "</script><script>alert(1)</script>"
    rows = [cell(hostile), cell(hostile, sparsity=0.7, status="FAILED", tags={"failure_message": hostile})]
    write_analysis(rows, tmp_path, title=hostile, figures=False)
    assert "<script>alert" not in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_progress_ends_where_it_said(tmp_path):
    class Seen(Progress):
        total = done = stopped = 0

        def start(self, stage, total, unit=""):
            self.total = total

        def advance(self, amount=1, note=""):
            self.done += amount

        def stop(self):
            self.stopped += 1

    seen = Seen()
    write_analysis([cell()], tmp_path, progress=seen)
    assert seen.done == seen.total > 0 and seen.stopped == 1


@pytest.mark.slow
def test_a_study_of_360_cells(tmp_path):
    result = write_analysis(study(), tmp_path)
    assert len(result.cells) == 366 and result.holes.empty
    assert len(result.curves) == 36 and len(result.sentences) == 6
    assert list(result.skipped) == ["layer_sparsity"]  # no run of masks is among them
    assert result.report.stat().st_size < 10e6

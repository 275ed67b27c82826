"""A study's note."""

from synthetic import cell, study

from sparse_ft.analysis.note import study_note
from sparse_ft.analysis.sentences import Sentence
from sparse_ft.analysis.table import cell_table

ANSWER = Sentence("synthetic-a", "boolq", "BoolQ on synthetic-a keeps 95 %.")


def test_a_note_has_the_answer_the_figures_the_command_and_the_table():
    cells = cell_table([cell(mode="dense", sparsity=0.0), cell(sparsity=0.125), cell(sparsity=0.9, status="FAILED")])
    note = study_note([ANSWER], cells, ["accuracy", "loss"], "sparse-ft sweep --config=a.yaml")
    assert note.startswith(ANSWER.text)
    assert "**1 of 3 cells have no result**" in note and "`accuracy`, `loss`" in note
    assert "```\nsparse-ft sweep --config=a.yaml\n```" in note
    rows = note.replace("&nbsp;", "")  # MLflow's page sets no space between columns
    assert "| method | mode | sparsity % | accuracy | perplexity | loss |" in rows and rows != note
    assert "| unstructured magnitude | sparse to sparse | 12.5 | 0." in rows and "out_of_memory" in rows


def test_a_table_that_is_too_long_is_cut_and_says_so():
    note = study_note([ANSWER], cell_table(study()), [])
    assert 5000 < len(note) <= 7100 and " of 366 cells; all are in `report/summary.csv`." in note


def test_a_study_without_cells_has_a_note():
    assert "No cell has a result." in study_note([], cell_table([]), [])

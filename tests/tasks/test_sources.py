"""Rows: hub columns in, the definition's columns out; BoolQ's splits told apart; errors that name the line."""

import json
from pathlib import Path

import pytest

from sparse_ft.errors import UserError
from sparse_ft.tasks.sources import adapt_row, local_rows, split_context

SHARED = Path(__file__).parents[3] / "shared" / "data"
BOOLQ = {"question": "is water wet", "passage": "Water -- It is."}


@pytest.mark.parametrize(
    ("answer", "label"), [(True, 1), (False, 0), ("True", 1), ("False", 0), ("yes", 1), (1, 1), (0, 0)]
)
def test_boolq_answers_in_every_form_that_is_published(answer, label):
    adapted = {**BOOLQ, "label": label}
    assert adapt_row("boolq", {**BOOLQ, "answer": answer}) == adapted
    assert adapt_row("boolq", {**BOOLQ, "label": answer, "idx": 7}) == adapted


@pytest.mark.parametrize("answer", ["maybe", 2, 0.5, "", [True]])
def test_boolq_refuses_what_is_no_answer(answer):
    with pytest.raises(UserError, match=r"file:3.*true or false expected"):
        adapt_row("boolq", {**BOOLQ, "answer": answer}, "file:3")


@pytest.mark.parametrize(
    ("ctx_a", "ctx_b"),
    [
        ("A man stands on a roof.", "he"),
        ("Two teams play. They run!", "the ball in the USA"),
        ("How to cook rice. Wash it first. Water should run clear.", ""),
        ("Is it done? It is", ""),
        ('She says "stop." ', ""),
        ('She says "stop."', "the dog"),
        ("no sentence has ended here", ""),
        ("It costs 2.50 dollars", ""),
        ("", ""),
    ],
)
def test_context_is_cut_where_the_published_columns_were_joined(ctx_a, ctx_b):
    joined = f"{ctx_a} {ctx_b}" if ctx_b else ctx_a
    assert split_context(joined) == (ctx_a, ctx_b)


def test_hellaswag_keeps_the_published_columns_where_they_are():
    row = {"activity_label": "A", "ctx_a": "One. two.", "ctx_b": "three", "ctx": "x", "endings": ["a", "b"], "label": 1}
    expected = {"activity_label": "A", "ctx_a": "One. two.", "ctx_b": "three", "endings": ["a", "b"], "label": "1"}
    assert adapt_row("hellaswag", row) == expected


@pytest.mark.parametrize("label", ["", "4", "x", "-1"])
def test_hellaswag_refuses_a_label_that_names_no_ending(label):
    row = {"activity_label": "A", "ctx": "One. two", "endings": ["a", "b", "c", "d"], "label": label}
    with pytest.raises(UserError, match="does not name one of the endings"):
        adapt_row("hellaswag", row)


def test_other_tasks_keep_every_column():
    assert adapt_row("piqa", {"goal": 1, "sol1": None}) == {"goal": 1, "sol1": None}


def test_errors_name_file_and_line(tmp_path):
    folder = tmp_path / "boolq"
    folder.mkdir()
    good = json.dumps({**BOOLQ, "answer": True})
    for text, message in [
        (f"{good}\n\n{{oops\n", r"train.jsonl:3 is not JSON"),
        (f"{good}\n[1]\n", r"train.jsonl:2 is not a JSON object"),
        ('{"question": "q", "answer": true}\n', r"train.jsonl:1 has no column 'passage'; it has answer, question"),
        ("\n", r"train.jsonl has no rows"),
    ]:
        (folder / "train.jsonl").write_text(text)
        with pytest.raises(UserError, match=message):
            local_rows("boolq", "train", tmp_path)
    assert local_rows("boolq", "validation", tmp_path) is None
    with pytest.raises(UserError, match="is not a folder"):
        local_rows("boolq", "train", tmp_path / "nowhere")


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real files beside the repository")
@pytest.mark.parametrize(
    ("task", "split", "count"),
    [
        ("boolq", "train", 9427),
        ("boolq", "validation", 1200),
        ("hellaswag", "validation", 2000),
        ("gsm8k", "test", 600),
    ],
)
def test_real_files_are_read_whole(task, split, count):
    assert len(local_rows(task, split, SHARED)) == count

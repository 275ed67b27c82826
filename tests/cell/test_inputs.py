"""What a cell looked at, as a store gives it back."""

import json
from dataclasses import replace

import mlflow.data
import pytest

from sparse_ft.cell.identity import cell_identity
from sparse_ft.cell.inputs import cell_inputs, mask_inputs
from sparse_ft.cell.workbench import Workbench
from sparse_ft.settings.cell import CellConfig, mask_set_of
from sparse_ft.tasks.made import made_data_dir
from sparse_ft.tracking.runs import Tracker


@pytest.fixture(scope="module")
def bench():
    return Workbench()


@pytest.fixture
def cell():
    return CellConfig(model="tiny-llama", data_dir="made", sparsity=0.5, perplexity_tokens=64)


def logged(cell, bench):
    """What for -> the dataset that a run of this cell has in a store; the cell's identity; the store."""
    tracker, identity = Tracker(), cell_identity(cell, bench)
    run_id = tracker.start("cell")
    tracker.log_inputs(run_id, cell_inputs(cell, identity, bench))
    found = tracker.client.get_run(run_id).inputs.dataset_inputs
    return {item.tags[0].value: item.dataset for item in found}, identity, tracker


def test_inputs_have_the_digests_of_the_identity(cell, bench):
    cell = replace(cell, importance="wanda", scope="row", num_fewshot=1)
    found, identity, tracker = logged(cell, bench)
    assert {context: data.name for context, data in found.items()} == {
        "training, few-shot, calibration": "boolq/train",
        "evaluation, perplexity": "boolq/validation",
    }
    data = found["training, few-shot, calibration"]
    assert data.digest == identity["training_data"]
    assert found["evaluation, perplexity"].digest == identity["scored_data"] != data.digest
    assert json.loads(data.profile) == {"num_rows": 240}
    columns = json.loads(data.schema)["mlflow_colspec"]
    assert [(column["name"], column["type"]) for column in columns] == [
        ("question", "string"),
        ("passage", "string"),
        ("label", "long"),
    ]
    assert mlflow.data.get_source(data).uri == str(made_data_dir() / "boolq" / "train.jsonl")
    assert [run.name for run in tracker.search("dataset.name = 'boolq/train' and dataset.context LIKE '%calib%'")]


def test_texts_and_lists_are_inputs_too(cell, bench, tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("Once there was a model.\n\nIt was pruned.\n" * 50)
    corpus = tmp_path / "rows.jsonl"
    corpus.write_text('{"text": "one"}\n{"text": "two"}\n')
    texts = {"calibration_corpus": str(text), "perplexity_corpus": str(text), "recover_corpus": str(corpus)}
    cell = replace(cell, task="hellaswag", importance="wanda", scope="row", recover_steps=2, **texts)
    found, identity, _ = logged(cell, bench)
    assert {context: data.name for context, data in found.items()} == {
        "training": "hellaswag/train",
        "evaluation": "hellaswag/validation",
        "calibration": "book.txt",
        "recovery": "rows.jsonl",
        "perplexity": "book.txt",
    }
    for context in ("calibration", "recovery", "perplexity"):
        assert found[context].digest == identity[f"{context}_text"]
    assert json.loads(found["recovery"].profile) == {"num_rows": 2}
    columns = json.loads(found["training"].schema)["mlflow_colspec"]
    assert next(column for column in columns if column["name"] == "endings")["type"] == "array"
    (masks,) = mask_inputs(replace(mask_set_of(cell), sparsities=(0.5,)), bench)
    assert (masks.digest, masks.contexts, masks.rows) == (identity["calibration_text"], ("calibration",), 150)


def test_rows_of_ones_own_are_inputs_in_the_place_of_the_tasks(cell, bench, tmp_path):
    rows, book = tmp_path / "rows.jsonl", tmp_path / "book.txt"
    rows.write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n{"prompt": "2 + 2 =", "completion": " 4"}\n')
    book.write_text("Once there was a model.")
    found, identity, _ = logged(replace(cell, train_data=str(rows), mix=str(book)), bench)
    assert {context: data.name for context, data in found.items()} == {
        "training": "rows.jsonl",
        "mixed in": "book.txt",
        "evaluation, perplexity": "boolq/validation",
    }
    assert found["training"].digest == identity["train_data"] and found["mixed in"].digest == identity["mixed_data"]
    assert json.loads(found["training"].profile) == {"num_rows": 2}
    assert mlflow.data.get_source(found["training"]).uri == str(rows)
    read = logged(replace(cell, train_data=str(rows), importance="wanda", scope="row"), bench)[0]
    assert {"training", "calibration"} <= set(read) and read["calibration"].name == "boolq/train"


def test_other_rows_of_the_same_name_are_another_dataset(cell, bench, tmp_path):
    rows = tmp_path / "boolq"
    rows.mkdir()
    for split in ("train", "validation"):
        lines = (made_data_dir() / "boolq" / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (rows / f"{split}.jsonl").write_text("".join(lines[:40]))
    pruned = replace(cell, mode="pruned")
    one, other = logged(pruned, bench)[0], logged(replace(pruned, data_dir=str(tmp_path)), bench)[0]
    (mine,), (yours,) = one.values(), other.values()  # nothing is trained, and no text is looked at
    assert mine.name == yours.name == "boolq/validation" and mine.digest != yours.digest
    assert mask_inputs(mask_set_of(pruned), bench) == []

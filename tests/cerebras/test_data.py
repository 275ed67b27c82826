import shutil
from dataclasses import dataclass

import h5py
import numpy as np
import pytest

from sparse_ft.cerebras.data import write_examples
from sparse_ft.errors import UserError


@dataclass
class Example:
    input_ids: list[int]
    answer_start: int


EXAMPLES = [Example([1, 10, 11, 12, 13, 2], 4), Example([1, 20, 21], 1), Example([1, 30, 31, 32, 33, 34, 35, 2], 6)]


def read_examples(folder):
    """``(input ids, loss mask, labels)`` of every row, in the order of writing."""
    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path) as file:
            yield from map(tuple, file["data"])


def test_position_i_predicts_the_next_token_and_only_answers_count(tmp_path):
    assert write_examples(EXAMPLES, tmp_path / "d", seq_len=8, pad_token_id=0) == 3
    rows = list(read_examples(tmp_path / "d"))
    for example, (ids, mask, labels) in zip(EXAMPLES, rows, strict=True):
        count = len(example.input_ids) - 1
        assert ids[:count].tolist() == example.input_ids[:-1]
        assert labels[:count].tolist() == example.input_ids[1:]
        assert labels[mask == 1].tolist() == example.input_ids[example.answer_start :]
        assert not ids[count:].any() and not mask[count:].any() and not labels[count:].any()


def test_the_file_is_modelzoos_format(tmp_path):
    write_examples(EXAMPLES, tmp_path / "d", seq_len=7, pad_token_id=5)
    (path,) = (tmp_path / "d").iterdir()
    with h5py.File(path) as file:
        assert file["data"].shape == (3, 3, 7) and file["data"].dtype == np.int32
        assert file.attrs["n_examples"] == 3


@pytest.mark.parametrize(
    "arguments, words",
    [({"seq_len": 6, "pad_token_id": 0}, "8 tokens"), ({"seq_len": 8, "pad_token_id": 0, "batch_size": 4}, "needs 4")],
)
def test_what_cannot_be_trained_on_is_refused(tmp_path, arguments, words):
    with pytest.raises(UserError, match=words):
        write_examples(EXAMPLES, tmp_path / "d", **arguments)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("name", ["boolq", "hellaswag", "gsm8k"])
def test_the_prompts_are_those_of_scoring(name, tiny_model, tmp_path):
    """The rows that are trained on, scored by lm-eval too: what it asks is what the files hold."""
    pytest.importorskip("lm_eval")  # the project's own environment has it, cerebras-pytorch's has not
    from sparse_ft.evaluation import ScoringSettings, evaluate
    from sparse_ft.models.loading import load_model, load_tokenizer
    from sparse_ft.tasks.definitions import load_task
    from sparse_ft.tasks.examples import gold_continuation, training_examples
    from sparse_ft.tasks.made import made_data_dir

    shutil.copytree(made_data_dir(), tmp_path / "rows")
    scored = tmp_path / "rows" / name / ("test.jsonl" if name == "gsm8k" else "validation.jsonl")
    lines = (tmp_path / "rows" / name / "train.jsonl").read_text().splitlines(keepends=True)[:5]
    for path in (scored, scored.with_name("train.jsonl")):
        path.write_text("".join(lines))
    task, folder = load_task(name, tmp_path / "rows", 0), tiny_model("tiny-llama")
    tokenizer = load_tokenizer(folder)
    examples = training_examples(task, tokenizer, max_seq_len=512)
    assert write_examples(examples, tmp_path / "d", 512, tokenizer.pad_token_id) == 5

    settings = ScoringSettings(perplexity_tokens=0, keep_samples=True)
    samples = evaluate(load_model(folder, "float32", "cpu"), tokenizer, task, settings).samples
    asked = {sample["doc_id"]: sample["arguments"][0][0] for sample in samples}
    answers = {sample["doc_id"]: gold_continuation(task, sample["doc"]) for sample in samples}
    found = set()
    for ids, mask, labels in read_examples(tmp_path / "d"):
        begin, end = mask.argmax(), len(mask) - mask[::-1].argmax()
        prompt = tokenizer.decode(ids[: begin + 1], skip_special_tokens=True)
        found.add((prompt, tokenizer.decode(labels[begin:end], skip_special_tokens=True)))
    assert found == {(asked[number], answers[number]) for number in asked}

"""Rows as people save them: read, or refused in one line that names file and line."""

import json

import pytest

from sparse_ft.errors import UserError
from sparse_ft.tasks.definitions import load_task
from sparse_ft.tasks.examples import training_examples
from sparse_ft.tasks.made import made_data_dir
from sparse_ft.tasks.sources import local_rows

ARC = {"id": "1", "question": "1+1?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _lines(rows, encoding="utf-8"):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(encoding)


def _made(task, split):
    return [json.loads(line) for line in (made_data_dir() / task / f"{split}.jsonl").read_text().splitlines()][:10]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"\xef\xbb\xbf" + content,
        lambda content: content.replace(b"\n", b"\r\n"),
        lambda content: content.replace(b"\n", b"\r"),
        lambda content: content.replace(b"\n", b"\n \n"),
        lambda content: content.rstrip(b"\n"),
    ],
    ids=["byte-order mark", "CRLF", "CR", "blank lines", "no last line end"],
)
def test_forms_of_text_that_are_read(change, tmp_path):
    rows = _made("boolq", "train")
    rows[0]["passage"] = "Caf\u00e9 \u2028 one line"
    _write(tmp_path / "boolq" / "train.jsonl", _lines(rows))
    expected = local_rows("boolq", "train", tmp_path)
    _write(tmp_path / "boolq" / "train.jsonl", change(_lines(rows)))
    assert local_rows("boolq", "train", tmp_path) == expected
    assert len(expected) == len(rows)


def _replaced(task, line, **columns):
    rows = _made(task, "train")
    rows[line - 1].update(columns)
    return _lines(rows)


REFUSED = {
    "UTF-16": ("boolq", lambda: _lines(_made("boolq", "train"), "utf-16"), "1 is UTF-16"),
    "UTF-16 without mark": ("boolq", lambda: _lines(_made("boolq", "train"), "utf-16-le"), "1 is not JSON"),
    "latin-1": (
        "boolq",
        lambda: _replaced("boolq", 4, passage="Caf\u00e9").decode().encode("latin-1"),
        "4 is not UTF-8",
    ),
    "a number": ("boolq", lambda: _replaced("boolq", 4, question=7), "4.*question.*text expected"),
    "a list": ("boolq", lambda: _replaced("boolq", 4, passage=["a"]), "4.*passage.*text expected"),
    "a maybe": ("boolq", lambda: _replaced("boolq", 4, answer="maybe"), "4.*maybe"),
    "an integer": ("gsm8k", lambda: _replaced("gsm8k", 3, answer=5), "3.*answer.*text expected"),
    "no ####": ("gsm8k", lambda: _replaced("gsm8k", 3, answer="five 5"), "3.*####"),
    "nothing after ####": ("gsm8k", lambda: _replaced("gsm8k", 3, answer="five\n#### "), "3.*####"),
    "a number among endings": (
        "hellaswag",
        lambda: _replaced("hellaswag", 2, endings=["a", 1, "b", "c"]),
        "2.*endings",
    ),
    "label out of range": ("hellaswag", lambda: _replaced("hellaswag", 2, label="9"), "2.*label"),
    "mixed column": ("other", lambda: _lines([{"text": "a"}, {"text": "b"}, {"text": 3}]), "3.*'text' is a number"),
    "mixed inside": ("other", lambda: _lines([{"a": {"b": ["x"]}}, {"a": {"b": [1]}}]), "2.*a.b"),
    "null inside": ("other", lambda: _lines([{"a": ["x", "y"]}, {"a": ["x", None]}]), "2.*null"),
    "NaN": ("other", lambda: b'{"a": 1}\n{"a": NaN}\n', "2.*NaN"),
    "huge": ("other", lambda: b'{"a": 1}\n{"a": 123456789012345678901234567890}\n', "2.*64 bits"),
    "very huge": ("other", lambda: b'{"a": 1}\n{"a": ' + b"1" * 5000 + b"}\n", "2.*cannot be read"),
    "deep": ("other", lambda: b'{"a": 1}\n' + b"[" * 100000 + b"\n", "2.*"),
    "surrogate": ("other", lambda: b'{"a": "x"}\n{"a": "\\ud800"}\n', "2.*surrogate"),
    "array": ("other", lambda: json.dumps([{"a": 1}]).encode(), "1 is not a JSON object"),
    "array over lines": ("other", lambda: json.dumps([{"a": 1}], indent=1).encode(), "1 is not JSON"),
    "empty": ("other", lambda: b"", " has no rows"),
    "blank": ("other", lambda: b"\n \n\r\n", " has no rows"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_used_is_one_line_with_its_place(kind, tmp_path):
    task, content, message = REFUSED[kind]
    path = tmp_path / task / "train.jsonl"
    _write(path, content())
    with pytest.raises(UserError, match=rf"{path}:?{message}") as told:
        local_rows(task, "train", tmp_path)
    assert "\n" not in str(told.value)


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "boolq" / "train.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match="is not a file"):
        local_rows("boolq", "train", tmp_path)


@pytest.mark.parametrize("line", [1, 4])
@pytest.mark.parametrize("split", ["train", "test"])
def test_an_answer_that_is_none_of_the_choices(split, line, tmp_path):
    rows = {name: [dict(ARC, id=f"{index}") for index in range(6)] for name in ("train", "test")}
    rows[split][line - 1]["answerKey"] = "E"
    for name, content in rows.items():
        _write(tmp_path / "arc_easy" / f"{name}.jsonl", b"\n" + _lines(content))
    with pytest.raises(UserError, match=rf"{split}.jsonl:{line + 1}") as told:
        load_task("arc_easy", tmp_path)
    assert "\n" not in str(told.value)


def test_a_task_without_a_training_split_says_so(tmp_path):
    for split in ("train", "test"):
        _write(tmp_path / "lambada_openai" / f"{split}.jsonl", _lines([{"text": f"the cat {i} sat"} for i in range(5)]))
    with pytest.raises(UserError, match="its definition names none"):
        training_examples(load_task("lambada_openai", tmp_path), None, 64)

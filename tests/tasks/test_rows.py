"""Rows of one's own: three shapes, from files, folders, a hub and corpora; what is wrong names the row."""

import json
import os
import subprocess
import sys

import datasets
import pytest
import yaml
from hub import COMMIT, hub_server

from sparse_ft.errors import UserError
from sparse_ft.tasks.rows import MESSAGES, PROMPTS, TEXT, read_rows

CHAT = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two."}]
ROWS = {
    TEXT: [{"text": "one"}, {"text": "two\u2028three"}],
    PROMPTS: [{"prompt": "1 + 1 =", "completion": " 2"}, {"prompt": "2 + 2 =", "completion": " 4"}],
    MESSAGES: [{"messages": CHAT}, {"messages": [{"role": "system", "content": "Be short."}, *CHAT]}],
}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("shape", ROWS)
def test_a_shape_is_known_by_its_columns_and_rows_by_what_is_in_them(tmp_path, shape):
    plain = read_rows(write(tmp_path / "a.jsonl", ROWS[shape]), None)
    more = read_rows(write(tmp_path / "b.jsonl", [{"id": 7, **row} for row in ROWS[shape]]), None)
    turned = read_rows(write(tmp_path / "c.jsonl", ROWS[shape][::-1]), None)
    assert plain.shape == shape and not plain.running
    assert plain.digest == more.digest != turned.digest and plain.digest.startswith(f"{shape} ")


def test_a_folder_is_its_training_files_or_all_of_them(tmp_path):
    for name in ("train-1", "train-2", "validation"):
        write(tmp_path / f"{name}.jsonl", [{"text": f"{name} first"}, {"text": name}])
    rows = read_rows(str(tmp_path), None)
    assert [row["text"] for row in rows.rows] == ["train-1 first", "train-1", "train-2 first", "train-2"]
    assert rows.where(3) == f"{tmp_path}/train-2.jsonl:2"
    for name in ("train-1", "train-2"):
        (tmp_path / f"{name}.jsonl").rename(tmp_path / f"my-{name}.jsonl")
    assert len(read_rows(str(tmp_path), None).rows) == 6


def test_texts_and_corpora_are_running_text(tmp_path):
    (tmp_path / "book.txt").write_text("one\ntwo\n", encoding="utf-8")
    book = read_rows(str(tmp_path / "book.txt"), None)
    assert (book.shape, book.running, list(book.rows)) == (TEXT, True, [{"text": "one\ntwo\n"}])
    write(tmp_path / "corpora" / "c4.jsonl", [{"text": "one"}, {"text": " "}, {"text": "two"}])
    corpus = read_rows("c4", str(tmp_path))
    assert (corpus.running, [row["text"] for row in corpus.rows]) == (True, ["one", "two"])
    assert book.digest == read_rows(write(tmp_path / "row.jsonl", [{"text": "one\ntwo\n"}]), None).digest


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": "a", "answer": "b"}], r"rows\.jsonl:1 has the columns answer, question; rows to train on have"),
        ([{"prompt": "a", "answer": "b"}], r"rows\.jsonl:1 has the columns answer, prompt;"),
        ([{"text": "a"}, {"prompt": "a", "completion": "b"}], r"rows\.jsonl:2 has no column text, which the first"),
        ([{"text": "a"}, {"text": " \n"}], r"rows\.jsonl:2 has an empty text"),
        ([{"text": "a"}, {"text": None}], r"rows\.jsonl:2 has null in its column text"),
        ([{"prompt": "a", "completion": ""}], r"rows\.jsonl:1 has an empty completion"),
        ([{"messages": CHAT}, {"messages": CHAT[:1]}], r"rows\.jsonl:2 has no turn of the assistant"),
        ([{"messages": []}], r"rows\.jsonl:1 has no messages"),
        ([{"messages": [*CHAT, {"role": "user"}]}], r"rows\.jsonl:1 has the message"),
        ([{"messages": [CHAT[0], CHAT[1] | {"content": " "}]}], r"rows\.jsonl:1 has an empty turn"),
        ([{"messages": CHAT[::-1]}], r"rows\.jsonl:1 begins with the assistant"),
        ([], r"rows\.jsonl has no rows"),
    ],
)
def test_what_is_wrong_with_a_row_is_one_line(tmp_path, rows, said):
    with pytest.raises(UserError, match=said) as error:
        read_rows(write(tmp_path / "rows.jsonl", rows), None)
    assert "\n" not in str(error.value)


def test_a_line_that_is_no_object_is_one_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n\n["b"]\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"rows\.jsonl:3 is not a JSON object"):
        read_rows(str(tmp_path / "rows.jsonl"), None)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.jsonl", "there is no such file or folder"),
        ("./owner/name", "there is no such file or folder"),
        ("plain", "there is no such file or folder"),
        ("table.csv", r"a file of rows is \.jsonl"),
        ("empty", "that folder has no JSONL file"),
    ],
)
def test_a_source_that_is_none_is_one_line(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=said):
        read_rows(name, None)


READ = """
import sys
from sparse_ft.errors import UserError
from sparse_ft.tasks.rows import read_rows
for source in sys.argv[1:]:
    try:
        rows = read_rows(source, None)
        print(rows.digest, len(rows.rows), rows.where(1))
    except UserError as error:
        print(error)
"""


def test_a_hubs_data_set_by_name_configuration_and_revision(tmp_path):
    """In a process of its own: where the hub is, libraries read at start."""
    repository = tmp_path / "datasets" / "owner" / "chats"
    about = []
    for name, rows in {"talk": ROWS[MESSAGES], "sums": ROWS[PROMPTS], "bad": [{"text": "a"}, {"text": ""}]}.items():
        (repository / name).mkdir(parents=True)
        datasets.Dataset.from_list([row | {"id": 1} for row in rows]).to_parquet(repository / name / "train.parquet")
        about.append({"config_name": name, "data_files": [{"split": "train", "path": f"{name}/train.parquet"}]})
    about[0]["default"] = True
    (repository / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': about})}---\n", encoding="utf-8")
    sources = [
        f"owner/chats{rest}" for rest in ("", ":sums", f":sums@{COMMIT}", ":bad", "@nowhere", f"@{40 * '0'}")
    ] + ["owner/gone"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    with hub_server(tmp_path) as (address, _):
        environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        done = subprocess.run([sys.executable, "-c", READ, *sources], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    talk, sums, same, bad, revision, other, gone = done.stdout.splitlines()
    assert talk == f"{read_rows(write(tmp_path / 'talk.jsonl', ROWS[MESSAGES]), None).digest} 2 owner/chats row 2"
    digest = read_rows(write(tmp_path / "sums.jsonl", ROWS[PROMPTS]), None).digest
    assert sums == f"{digest} 2 owner/chats:sums row 2" and same.startswith(f"{digest} 2 owner/chats:sums@{COMMIT}")
    assert bad == "owner/chats:bad row 2 has an empty text"
    assert revision.startswith("cannot load the split train of owner/chats@nowhere from the hub (")
    assert other.startswith(f"cannot load the split train of owner/chats@{40 * '0'} from the hub (")
    assert gone.startswith("cannot load the split train of owner/gone from the hub (")

"""Calibration text as the papers have it."""

import json
import random

import datasets
import pytest
import torch

from sparse_ft.errors import UserError
from sparse_ft.models.catalog import locate
from sparse_ft.models.loading import load_tokenizer
from sparse_ft.tasks.corpora import CorpusRows, drawn_windows, held_out_rows, training_rows
from sparse_ft.tasks.made import made_data_dir

ROWS = [json.loads(line)["passage"] for line in (made_data_dir() / "boolq" / "train.jsonl").open(encoding="utf-8")][:60]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(locate("tiny-llama"))


def as_published(name, rows, samples, length, seed, tokenizer):
    """What locuslab/wanda's ``lib/data.py`` and IST-DASLab/sparsegpt's ``datautils.py`` do, with the global dice."""
    random.seed(seed)
    found = []
    whole = tokenizer(" ".join(rows), return_tensors="pt").input_ids if name == "wikitext2" else None
    for _ in range(samples):
        ids = whole
        while ids is None or ids.shape[1] <= length:
            i = random.randint(0, len(rows) - 1)
            ids = tokenizer(rows[i], return_tensors="pt").input_ids
        i = random.randint(0, ids.shape[1] - length - 1)
        found.append(ids[:, i : i + length])
    return torch.cat(found)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_the_windows_are_those_of_the_papers_code(tmp_path, tokenizer, name, seed):
    (tmp_path / "corpora").mkdir()
    lines = [json.dumps({"text": row, "url": "http://"}, ensure_ascii=False) for row in ROWS]
    (tmp_path / "corpora" / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    corpus = training_rows(name, str(tmp_path))
    drawn = drawn_windows(corpus, tokenizer, samples=9, seq_len=40, seed=seed)
    assert torch.equal(drawn, as_published(name, ROWS, 9, 40, seed, tokenizer))
    assert not torch.equal(drawn, drawn_windows(corpus, tokenizer, samples=9, seq_len=40, seed=seed + 1))


def test_from_folders_of_the_hubs_layout(tmp_path, monkeypatch):
    """What the hub holds, read by the real loader: wikitext2 by its configuration, of c4 one file of each split,
    of fineweb_edu parts of one."""
    wikitext, c4 = tmp_path / "Salesforce" / "wikitext", tmp_path / "allenai" / "c4" / "en"
    (wikitext / "wikitext-2-raw-v1").mkdir(parents=True)
    c4.mkdir(parents=True)
    parts = {"train": ["", " = River = \n", *ROWS[:5]], "test": ["", " = Sea = \n", *ROWS[5:9]]}
    card = "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
    for split, rows in parts.items():
        place = f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict({"text": rows}).to_parquet(wikitext / place)
        card += f"  - split: {split}\n    path: {place}\n"
    (wikitext / "README.md").write_text(f"{card}---\n")
    for file, rows in (("c4-train.00000-of-01024", ROWS), ("c4-validation.00000-of-00008", ROWS * 30)):
        datasets.Dataset.from_dict({"text": rows, "url": rows}).to_json(c4 / f"{file}.json.gz", compression="gzip")
    (c4 / "c4-train.00001-of-01024.json.gz").write_bytes(b"another file, which nobody wants")
    fineweb = tmp_path / "HuggingFaceFW" / "fineweb-edu" / "sample" / "10BT"
    fineweb.mkdir(parents=True)
    many = [f"{number}" for number in range(100_003)]
    datasets.Dataset.from_dict({"text": many, "id": many}).to_parquet(fineweb / "000_00000.parquet")
    (fineweb / "001_00000.parquet").write_bytes(b"another file, which nobody wants")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert list(training_rows("fineweb_edu", None).rows) == many[:100_000]
    assert held_out_rows("fineweb_edu", None)[1] == ["100000 100001 100002"]  # what follows those trained on
    assert list(training_rows("wikitext2", None).rows) == parts["train"]
    assert list(training_rows("c4", None).rows) == ROWS
    assert held_out_rows("c4", None) == ("c4/validation", [" ".join((ROWS * 30)[:1100])])
    name, rows = held_out_rows("wikitext2", None)
    assert (name, list(rows)) == ("wikitext-2-raw/test", parts["test"])


def test_files_of_ones_own(tmp_path, tokenizer):
    book, rows = tmp_path / "book.txt", tmp_path / "rows.jsonl"
    book.write_text("one\ntwo\u2028still two\n", encoding="utf-8")
    rows.write_text('{"text": "a\u2028b"}\n\n{"text": "c"}\n', encoding="utf-8")
    assert (
        training_rows(str(book), None).rows == ["one\n", "two\u2028still two\n"]
        and training_rows(str(book), None).joined
    )
    assert training_rows(str(rows), None) == CorpusRows(["a\u2028b", "c"], joined=False)
    assert training_rows(str(rows), None).digest != training_rows(str(book), None).digest
    assert CorpusRows(["ab", "c"], True).digest != CorpusRows(["a", "bc"], True).digest


def test_what_is_wrong_is_said(tmp_path, tokenizer):
    bad = tmp_path / "bad.jsonl"
    for content, said in (('{"text": "a"}\n{"txt": 1}', "bad.jsonl:2 has no text"), ("nope", "bad.jsonl:1 is no JSON"),
                          ("\n", "has no rows")):  # fmt: skip
        bad.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=said):
            training_rows(str(bad), None)
    bad.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="is not UTF-8"):
        training_rows(str(bad), None)
    with pytest.raises(UserError, match="no row of the calibration text is longer than 2000 tokens"):
        drawn_windows(CorpusRows(ROWS, joined=False), tokenizer, 2, 2000, 0)
    with pytest.raises(UserError, match="a window has 2000"):
        drawn_windows(CorpusRows(["short"], joined=True), tokenizer, 2, 2000, 0)


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def test_without_a_hub_the_line_says_where_to_put_the_file(no_hub):
    with pytest.raises(UserError, match=r"put it into data_dir/corpora/c4\.jsonl"):
        training_rows("c4", None)
    with pytest.raises(UserError, match=r"put it into data_dir/corpora/wikitext2\.test\.jsonl"):
        held_out_rows("wikitext2", None)
    with pytest.raises(UserError, match=r"put it into data_dir/corpora/fineweb_edu\.jsonl"):
        training_rows("fineweb_edu", None)
    with pytest.raises(UserError, match=r"put it into data_dir/corpora/fineweb_edu\.held_out\.jsonl"):
        held_out_rows("fineweb_edu", None)

"""Perplexity against transformers' own loss, window by window."""

import math
import statistics

import datasets
import pytest
import torch

from sparse_ft.errors import UserError
from sparse_ft.evaluation.perplexity import corpus_texts, perplexity
from sparse_ft.models.loading import load_model, load_tokenizer
from sparse_ft.tasks.definitions import load_task
from sparse_ft.tasks.made import made_data_dir

TEXTS = [f"In the year {year} the river rose, and {year % 7} lamps were lit." for year in range(1900, 1960)]


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model("tiny-llama"), "float32", "cpu")


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model("tiny-llama"))


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_is_gptqs_protocol(batch_size, model, tokenizer):
    """Written out as GPTQ writes it: mean loss of each window, times its length, over all lengths."""
    seq_len = 96
    ids = tokenizer("\n\n".join(TEXTS), return_tensors="pt")["input_ids"]
    windows = ids.shape[1] // seq_len
    losses = []
    with torch.no_grad():
        for window in range(windows):
            part = ids[:, window * seq_len : (window + 1) * seq_len]
            losses.append(model(part, labels=part).loss.double().item())
    total = sum(losses) * seq_len
    found = perplexity(model, tokenizer, TEXTS, seq_len, batch_size=batch_size)
    assert windows > 5 and (found.windows, found.seq_len, found.tokens) == (windows, seq_len, windows * (seq_len - 1))
    assert found.value == pytest.approx(math.exp(total / (windows * seq_len)), rel=1e-5)
    assert found.loss == pytest.approx(math.log(found.value))
    assert found.loss_stderr == pytest.approx(statistics.stdev(losses) / math.sqrt(windows), rel=1e-4)
    assert found.stderr == found.value * found.loss_stderr


def test_max_tokens_is_rounded_up_to_windows(model, tokenizer):
    part = perplexity(model, tokenizer, TEXTS, 64, max_tokens=65)
    assert part.windows == 2
    ids = tokenizer("\n\n".join(TEXTS))["input_ids"][:128]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert tokenizer(text)["input_ids"] == ids
    assert perplexity(model, tokenizer, [text], 64).value == part.value


def test_a_short_text_is_one_window(model, tokenizer):
    ids = tokenizer(TEXTS[0])["input_ids"]
    found = perplexity(model, tokenizer, TEXTS[:1], 512)
    assert (found.seq_len, found.windows, found.tokens) == (len(ids), 1, len(ids) - 1)
    assert math.isnan(found.loss_stderr)
    with pytest.raises(UserError, match="2 or more"):
        perplexity(model, tokenizer, [], 512)
    with pytest.raises(UserError, match="it must be 2 or more"):
        perplexity(model, tokenizer, TEXTS, 1)


def test_of_a_model_that_knows_nothing_is_the_vocabulary(model, tokenizer, tiny_model):
    blank = load_model(tiny_model("tiny-mistral"), "float32", "cpu")
    torch.nn.init.zeros_(blank.lm_head.weight)
    assert perplexity(blank, tokenizer, TEXTS, 64).value == pytest.approx(512)


def test_corpora(tmp_path):
    task = load_task("boolq", made_data_dir())
    name, texts = corpus_texts("task", task)
    assert name == "boolq/validation" and next(iter(texts)) == task.eval_docs[0]["passage"]
    (tmp_path / "book.txt").write_text("ein Fluß", encoding="utf-8")
    assert corpus_texts(str(tmp_path / "book.txt"), task) == ("book.txt", ["ein Fluß"])


def test_wikitext_from_a_folder_of_the_hubs_layout(tmp_path, monkeypatch, model, tokenizer):
    """The hub's own layout (a card that names the configuration's files, parquet), read by the real loader."""
    folder = tmp_path / "Salesforce" / "wikitext"
    (folder / "wikitext-2-raw-v1").mkdir(parents=True)
    lines = ["", " = River = \n", "", *(f" {text} \n" for text in TEXTS), ""]
    datasets.Dataset.from_dict({"text": lines}).to_parquet(folder / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
        "  - split: test\n    path: wikitext-2-raw-v1/test-*\n---\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    name, texts = corpus_texts("wikitext2", load_task("boolq", made_data_dir()))
    assert name == "wikitext-2-raw/test" and list(texts) == lines
    ids = torch.tensor(tokenizer("\n\n".join(lines))["input_ids"])  # GPTQ's way: every line, blank ones too
    found = perplexity(model, tokenizer, texts, 64)
    assert found.windows == len(ids) // 64
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.item() for row in ids[: found.windows * 64].view(-1, 64)]
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)

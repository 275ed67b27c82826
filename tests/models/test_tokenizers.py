"""Tokenizers as people save them, brought to what the rest counts on: an open end, a pad id inside the embedding."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import processors
from transformers import AutoTokenizer, ByT5Tokenizer

from sparse_ft.errors import UserError
from sparse_ft.models.loading import load_tokenizer, saved_tokenizer
from sparse_ft.models.tiny import tiny_tokenizer
from sparse_ft.tasks.definitions import load_task
from sparse_ft.tasks.examples import token_stream, training_examples
from sparse_ft.tasks.made import made_data_dir

TOKENS = [("<s>", 1), ("</s>", 2), ("<pad>", 0)]
CLOSING = {
    "bos and eos": processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> <s> $B </s>", special_tokens=TOKENS
    ),
    "eos only": processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=TOKENS),
    "another token": processors.TemplateProcessing(
        single="<s> $A <pad>", pair="<s> $A <pad> $B <pad>", special_tokens=TOKENS
    ),
    "two at each end": processors.TemplateProcessing(
        single="<s> <s> $A </s> </s>", pair="<s> $A </s> $B </s>", special_tokens=TOKENS
    ),
    "bert": processors.BertProcessing(("</s>", 2), ("<s>", 1)),
    "roberta": processors.RobertaProcessing(("</s>", 2), ("<s>", 1)),
    "sequence": processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=TOKENS),
        ]
    ),
}
OPEN = {"eos only": [], "two at each end": [1, 1]}


def _folder(tmp_path, change, rows=512, said=512):
    """A tokenizer beside an embedding of so many rows, whose configuration says that it has ``said``."""
    tokenizer = tiny_tokenizer()
    change(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": said}))
    save_file({"model.embed_tokens.weight": torch.zeros(rows, 4)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("kind", CLOSING)
def test_no_text_is_closed(kind, tmp_path):
    folder = _folder(tmp_path, lambda t: setattr(t.backend_tokenizer, "post_processor", CLOSING[kind]))
    tokenizer, plain = load_tokenizer(folder), tiny_tokenizer()
    first = OPEN.get(kind, [1])
    for text in ("a", "Anna has 3 apples. yes", " yes", "two\n\nlines "):
        assert tokenizer.encode(text) == first + plain.encode(text, add_special_tokens=False)
    opened = AutoTokenizer.from_pretrained(folder)
    opened.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*(["<s>"] * len(first)), "$A"], pair="$A $B", special_tokens=TOKENS
    )
    for name in ("boolq", "hellaswag", "gsm8k"):
        task = load_task(name, made_data_dir())
        assert training_examples(task, tokenizer, 512, limit=3) == training_examples(task, opened, 512, limit=3)
    assert token_stream(["one two", "three"], tokenizer) == token_stream(["one two", "three"], opened)


def test_a_tokenizer_without_a_template_that_closes_every_text_is_one_line(tmp_path):
    """One in Python, whose closing token is code: it cannot be taken away."""
    folder = _folder(tmp_path, lambda t: None)
    (tmp_path / "tokenizer.json").unlink()
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).encode("a")[-1] == 1
    with pytest.raises(UserError, match=r"the tokenizer closes every text with \['</s>'\], so that") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_what_is_saved_is_the_users_own(tmp_path):
    folder = _folder(tmp_path, lambda t: setattr(t.backend_tokenizer, "post_processor", CLOSING["bos and eos"]))
    load_tokenizer(folder)
    saved_tokenizer(folder).save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").encode("a")[-1] == 2
    before, after = (json.loads((place / "tokenizer.json").read_text()) for place in (folder, tmp_path / "again"))
    assert before == after


def test_a_pad_token_outside_the_embedding_is_replaced(tmp_path):
    folder = _folder(tmp_path, lambda t: t.add_special_tokens({"pad_token": "[PAD]"}))
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == 512
    assert load_tokenizer(folder).pad_token_id == 2


def test_no_special_tokens_is_one_line(tmp_path):
    folder = _folder(tmp_path, lambda t: None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        config.pop(name, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no end token") as told:
        load_tokenizer(folder)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("said", [300, 512])
def test_a_tokenizer_of_another_model_is_one_line(said, tmp_path):
    """Told by the embedding itself: a configuration may say more than there is."""
    folder = _folder(tmp_path, lambda t: None, rows=300, said=said)
    with pytest.raises(UserError, match=r"512 tokens.*300"):
        load_tokenizer(folder)

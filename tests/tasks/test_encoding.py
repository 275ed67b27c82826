"""What of a row is learned, against labels made by hand, and by the templates that TRL has."""

from itertools import chain

import pytest

from sparse_ft.errors import UserError
from sparse_ft.models.tiny import tiny_tokenizer
from sparse_ft.tasks.encoding import encoded, template_digest
from sparse_ft.tasks.packing import pieces
from sparse_ft.tasks.rows import MESSAGES, PROMPTS, TEXT, Rows

PLAIN = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>\n"
    "{% endgeneration %}{% else %}{{ m.content }}</s>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
FORGETFUL = PLAIN.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else '-' }}")
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Is it true?"},
    {"role": "assistant", "content": "Yes, it is."},
    {"role": "user", "content": "And the sea?"},
    {"role": "assistant", "content": "No."},
]


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def rows(shape, *content):
    return Rows(shape, content, lambda number: f"rows.jsonl:{number + 1}")


def learned(example):
    """The tokens that the loss is taken on."""
    ids, out = example.input_ids, set(example.left_out)
    return [ids[at] for at in range(example.answer_start, len(ids)) if at not in out]


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def one(tokenizer, shape, row, everything=False, length=500):
    (example,) = encoded(rows(shape, row), tokenizer, length, everything, seed=0)
    return example


def test_of_a_text_all_is_learned_and_where_it_ends(tokenizer):
    example = one(tokenizer, TEXT, {"text": "The sea is the same."})
    assert example.input_ids == [1, *plain(tokenizer, "The sea is the same."), 2]
    assert (example.answer_start, example.left_out) == (1, ())


@pytest.mark.parametrize("everything", [False, True])
def test_of_a_prompt_the_completion_is_learned_or_all(tokenizer, everything):
    example = one(tokenizer, PROMPTS, {"prompt": "Is it true?\n", "completion": "no, no"}, everything)
    prompt, completion = plain(tokenizer, "Is it true?\n"), [*plain(tokenizer, "no, no"), 2]
    assert example.input_ids == [1, *prompt, *completion]
    assert learned(example) == (prompt if everything else []) + completion


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_of_a_conversation_the_assistants_turns_are_learned(tokenizer, template):
    tokenizer.chat_template = template
    example = one(tokenizer, MESSAGES, {"messages": CHAT})
    parts = [plain(tokenizer, f"<s>{m['role']}\n") + plain(tokenizer, f"{m['content']}</s>\n") for m in CHAT]
    assert example.input_ids == list(chain(*parts))
    assert learned(example) == plain(tokenizer, "Yes, it is.</s>\n") + plain(tokenizer, "No.</s>\n")
    assert learned(one(tokenizer, MESSAGES, {"messages": CHAT}, everything=True)) == example.input_ids[1:]


def test_templates_that_have_no_marks_get_those_of_trl(tokenizer):
    """Qwen3's drops what was thought once another turn follows: TRL's for it does not, and marks the turns."""
    from trl.chat_template_utils import qwen3_chat_template, qwen3_training_chat_template

    thought = [*CHAT[1:2], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}, *CHAT[3:]]
    tokenizer.chat_template = qwen3_chat_template
    own = template_digest(tokenizer)
    example = one(tokenizer, MESSAGES, {"messages": thought})
    text = tokenizer.decode(learned(example))
    assert "<think>\nhm\n</think>\n\nYes.<|im_end|>" in text and "No.<|im_end|>" in text and "sea" not in text
    tokenizer.chat_template = qwen3_training_chat_template
    assert one(tokenizer, MESSAGES, {"messages": thought}) == example and template_digest(tokenizer) == own


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "rows.jsonl:1: messages need a chat template and the model's tokenizer has none"),
        (FORGETFUL, "rows.jsonl:1: the chat template writes a turn otherwise once another follows it"),
        ("{{ raise_exception('roles must alternate') }}", "rows.jsonl:1: roles must alternate"),
    ],
)
def test_a_template_that_cannot_serve_is_one_line_with_the_row(tokenizer, template, said):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=said) as error:
        one(tokenizer, MESSAGES, {"messages": CHAT})
    assert "\n" not in str(error.value)


def test_a_row_that_is_too_long_is_one_line_with_the_row(tokenizer):
    with pytest.raises(UserError, match=r"rows\.jsonl:1 has \d+ tokens, max_seq_len is 5: raise it, take pack"):
        one(tokenizer, TEXT, {"text": "The sea is the same as the river."}, length=5)
    with pytest.raises(UserError, match=r"max_seq_len is 5: raise it or shorten the row"):
        one(tokenizer, PROMPTS, {"prompt": "The sea is the same as", "completion": " it"}, length=5)


def test_running_text_is_cut_where_a_sequence_is_full(tokenizer):
    texts = rows(TEXT, {"text": "The sea is the same as the river, or not."}, {"text": "no"})
    whole = list(encoded(texts, tokenizer, 5, False, seed=0, cut=True))
    cut = list(pieces(whole, 5))
    assert max(len(piece.input_ids) for piece in cut) == 5 and all(piece.answer_start == 1 for piece in cut)
    every = [text.input_ids[begin : begin + 5] for text in whole for begin in range(0, len(text.input_ids), 5)]
    assert [piece.input_ids for piece in cut] == [ids for ids in every if len(ids) > 1]


def test_the_order_is_the_seeds(tokenizer):
    texts = rows(TEXT, *({"text": f"the {number}"} for number in range(20)))
    orders = [[e.input_ids for e in encoded(texts, tokenizer, 50, False, seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])

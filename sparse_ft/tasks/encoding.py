"""From rows to training sequences: text, prompts with completions, and conversations by the chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from sparse_ft.errors import UserError
from sparse_ft.tasks.examples import Example, shuffled
from sparse_ft.tasks.rows import MESSAGES, PROMPTS, TEXT, Rows

__all__ = ["encoded", "template_digest"]

Message = Mapping[str, str]
Marked = tuple[list[int], list[bool]]  # token ids, and which of them are learned


def encoded(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, max_seq_len: int, everything: bool, seed: int, cut: bool = False
) -> Iterator[Example]:
    """Training sequences of rows, one a row, in an order by ``seed``.

    Of a text every token is learned, and the end token after it. A completion is learned with the end token after it;
    where it begins is found as TRL finds it, by the tokens that prompt, and prompt with completion, have in common. Of
    a conversation the assistant's turns are learned, each with what ends it, as the chat template has them.

    Args:
        rows: what is trained on.
        tokenizer: of the model.
        max_seq_len: most tokens of a sequence.
        everything: prompts and the other turns are learned too.
        seed: of the order.
        cut: text may be longer; whoever asked cuts it.

    Raises:
        UserError: a row that is too long or that the chat template cannot write, or no chat template; names the row.
    """
    encode = _encoder(rows.shape, tokenizer)
    for number in shuffled(range(len(rows.rows)), seed):
        try:
            ids, learned = encode(rows.rows[number])
        except (UserError, TemplateError) as error:
            raise UserError(f"{rows.where(number)}: {' '.join(str(error).split())}") from None
        if len(ids) > max_seq_len and not (cut and rows.shape == TEXT):
            advice = "raise it, take packing, which cuts text, or" if rows.shape == TEXT else "raise it or"
            raise UserError(
                f"{rows.where(number)} has {len(ids)} tokens, max_seq_len is {max_seq_len}: {advice} shorten the row"
            )
        marks = [False] + ([True] * (len(ids) - 1) if everything else learned[1:])  # nothing foretells the first token
        if not any(marks):
            raise UserError(f"{rows.where(number)} has no token to learn")
        begin = marks.index(True)
        yield Example(ids, begin, tuple(at for at in range(begin, len(ids)) if not marks[at]))


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits of what conversations are written with."""
    return hashlib.sha256(repr(_template(tokenizer)).encode()).hexdigest()[:16]


def _encoder(shape: str, tokenizer: PreTrainedTokenizerBase) -> Callable[[Mapping[str, Any]], Marked]:
    def ended(ids: Sequence[int]) -> list[int]:
        eos = tokenizer.eos_token_id
        return [*ids] if eos is None or list(ids[-1:]) == [eos] else [*ids, eos]

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, verbose=False)["input_ids"]

    def text(row: Mapping[str, Any]) -> Marked:
        ids = ended(ids_of(row["text"]))
        return ids, [True] * len(ids)

    def prompts(row: Mapping[str, Any]) -> Marked:
        alone, ids = ids_of(row["prompt"]), ended(ids_of(row["prompt"] + row["completion"]))
        common = next(at for at in count() if at >= min(len(alone), len(ids)) or alone[at] != ids[at])
        return ids, [at >= common for at in range(len(ids))]

    def messages(row: Mapping[str, Any]) -> Marked:
        said = [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
        return _conversation(said, tokenizer, *template)

    template = _template(tokenizer) if shape == MESSAGES else (None, False)
    return {TEXT: text, PROMPTS: prompts, MESSAGES: messages}[shape]


def _template(tokenizer: PreTrainedTokenizerBase) -> tuple[str | None, bool]:
    """The chat template that training takes, and whether it marks what the assistant says.

    TRL has templates with marks for those that many models come with and that have none, or that write a turn otherwise
    once another follows it (Qwen3 drops what was thought).
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is None:
        return None, False
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    with suppress(ValueError, TypeError, TemplateError):  # TRL does not know it
        template = get_training_chat_template(tokenizer) or template
    return template, has_generation_markers(template)


def _conversation(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str | None, marked: bool
) -> Marked:
    if template is None:
        raise UserError(
            "messages need a chat template and the model's tokenizer has none; take an instruct model, or rows of"
            " prompt and completion"
        )

    def written(some: Sequence[Message], **options: Any) -> Mapping[str, Any]:
        return tokenizer.apply_chat_template(
            list(some), chat_template=template, tokenize=True, return_dict=True, **options
        )

    if marked:
        found = written(messages, return_assistant_tokens_mask=True)
        return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]
    ids = list(written(messages)["input_ids"])
    learned = [False] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = list(written(messages[:number], add_generation_prompt=True)["input_ids"])
        until = list(written(messages[: number + 1])["input_ids"])
        if ids[: len(until)] != until or until[: len(before)] != before:
            raise UserError(
                "the chat template writes a turn otherwise once another follows it, so where the assistant speaks"
                " cannot be told; give it the marks {% generation %} and {% endgeneration %}"
            )
        learned[len(before) : len(until)] = [True] * (len(until) - len(before))
    return ids, learned

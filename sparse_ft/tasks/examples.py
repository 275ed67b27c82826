"""Token sequences out of a task: training examples, held-out texts, calibration batches."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from sparse_ft.errors import UserError
from sparse_ft.tasks.definitions import gold_index, has_training_split
from sparse_ft.tasks.finding import quiet

__all__ = [
    "Example",
    "PairEncoder",
    "calibration_texts",
    "calibration_tokens",
    "chat_template_of",
    "check_ids",
    "gold_continuation",
    "gold_index",
    "held_out_texts",
    "shuffled",
    "task_examples",
    "token_stream",
    "training_examples",
]


@dataclass(frozen=True)
class Example:
    """One training sequence: the loss is taken on ``input_ids[answer_start:]``, the rest is context.

    Attributes:
        left_out: positions after ``answer_start`` that the loss is not taken on either.
        documents: the lengths of the documents that the sequence is packed of; none: it is one.
    """

    input_ids: list[int]
    answer_start: int
    left_out: tuple[int, ...] = ()
    documents: tuple[int, ...] = ()


class PairEncoder(HFLM):
    """lm-eval's way from (context, continuation) to token ids, without a model.

    Everything but the constructor is HFLM's own, so a training prompt has the tokens it is scored with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # HFLM's constructor wants a model and changes the tokenizer's padding; encoding needs neither.
        self.tokenizer = tokenizer
        self.add_bos_token = None
        self.custom_prefix_token_id = None
        self.backend = "causal"
        self.chat_template_args: dict[str, Any] = {}

    def encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of context and continuation, as ``HFLM.loglikelihood`` would feed them."""
        if context:
            return self._encode_pair(context, continuation)
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        if tokens[:1] == [self.prefix_token_id]:
            return tokens[:1], tokens[1:]
        return [self.prefix_token_id], tokens


def chat_template_of(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """The chat template that lm-eval applies.

    Raises:
        UserError: there is none.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise UserError(
            f"chat_template: the tokenizer of {name} has no chat template; take the model's instruct version, or leave"
            " chat_template out"
        )
    return template


def gold_continuation(task: Task, doc: Any, chat: bool = False) -> str:
    """The right answer as it follows the prompt, delimiter included (``" yes"`` for BoolQ); after a chat template,
    which ends with one of its own, without, as in lm-eval.

    Raises:
        UserError: the row's answer names none of its choices.
    """
    if task.config.doc_to_choice is not None and not task.multiple_input:
        target = task.doc_to_choice(doc)[gold_index(task, doc)]
    else:
        target = task.doc_to_target(doc)
        target = target[0] if isinstance(target, list) else target  # the one that few-shot examples show
    prefix = task.config.gen_prefix
    begun = prefix and not str(prefix)[-1:].isspace()
    bare = task.OUTPUT_TYPE == "loglikelihood" or (chat and not begun)
    return f"{'' if bare else task.config.target_delimiter}{target}"


def prompt(task: Task, doc: Any, num_fewshot: int = 0, chat: PairEncoder | None = None) -> str:
    """The text before the answer, as lm-eval builds it for scoring, with ``num_fewshot`` examples; with ``chat`` in the
    chat template of its tokenizer."""
    told: dict[str, Any] = {}
    if chat is not None:
        told = {"apply_chat_template": True, "fewshot_as_multiturn": True, "chat_template": chat.apply_chat_template}
    context = task.fewshot_context(doc, num_fewshot=num_fewshot, gen_prefix=task.doc_to_prefix(doc), **told)
    if isinstance(context, list):  # one context per choice (winogrande); the right one's
        return context[gold_index(task, doc)]
    return context


def training_examples(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    limit: int | None = None,
    seed: int = 0,
    chat: bool = False,
) -> list[Example]:
    """The first ``limit`` of `task_examples`."""
    return list(islice(task_examples(task, tokenizer, max_seq_len, seed, chat), limit))


def task_examples(
    task: Task, tokenizer: PreTrainedTokenizerBase, max_seq_len: int, seed: int = 0, chat: bool = False
) -> Iterator[Example]:
    """Zero-shot prompts and gold answers of the training split, tokenised as scoring tokenises them.

    The rows are shuffled by ``seed``. A sequence longer than
    ``max_seq_len`` loses tokens at the left of its prompt, as lm-eval truncates, never of its answer.
    Generative tasks get the end-of-sequence token after the answer, so that the model learns to stop;
    multiple-choice answers do not, because what is scored ends with the answer. With ``chat`` the prompts
    are in the tokenizer's chat template.

    Returns:
        Examples of at most ``max_seq_len`` tokens, one or more of them before the answer.

    Raises:
        UserError: the task has no training split, an answer does not fit into ``max_seq_len``, or there is no chat
            template.
    """
    encoder = PairEncoder(tokenizer)
    if chat:
        chat_template_of(tokenizer, "the model")
    if task.OUTPUT_TYPE == "generate_until" and tokenizer.eos_token_id is None:
        raise UserError(f"{task.config.task} needs a tokenizer with an end token; name eos_token in its configuration")
    eos = tokenizer.eos_token_id if task.OUTPUT_TYPE == "generate_until" else None
    for doc in shuffled(_training_docs(task), seed):
        question = prompt(task, doc, chat=encoder if chat else None)
        context, answer = encoder.encode(question, gold_continuation(task, doc, chat))
        if eos is not None and answer[-1:] != [eos]:
            answer = [*answer, eos]
        room = max_seq_len - len(answer)
        if room < 1:
            raise UserError(
                f"max_seq_len is {max_seq_len}, but an answer of {task.config.task} has {len(answer)} "
                f"tokens; set it to {len(answer) + 1} or more"
            )
        context = context[-room:]
        yield Example(context + answer, len(context))


def held_out_texts(task: Task) -> Iterator[str]:
    """Texts of the scored split for perplexity, in its order, without repeats.

    BoolQ: the passages. HellaSwag: context and right ending. Any other: prompt and answer (GSM8K:
    question and worked answer). They are made as they are taken: a split may hold far more than is wanted.
    """
    with quiet():
        docs = task.eval_docs
    return _texts(task, docs)


def calibration_texts(task: Task, seed: int = 0) -> Iterator[str]:
    """The same kind of texts as :func:`held_out_texts`, of the training split, in an order by ``seed``.

    Raises:
        UserError: the task has no training split.
    """
    return _texts(task, shuffled(_training_docs(task), seed))


def calibration_tokens(
    task: Task, tokenizer: PreTrainedTokenizerBase, samples: int, seq_len: int, seed: int = 0
) -> torch.Tensor:
    """Windows of training text for pruning methods that look at activations or gradients.

    The texts are shuffled by ``seed``, joined by blank lines, and cut into windows without overlap.

    Returns:
        Token ids, int64 ``[samples, seq_len]``.

    Raises:
        UserError: the task has no training split or too little text; says how many windows there are.
    """
    tokens = token_stream(calibration_texts(task, seed), tokenizer, samples * seq_len)
    if len(tokens) < samples * seq_len:
        raise UserError(
            f"calibration asks for {samples} samples of {seq_len} tokens, but the training text of "
            f"{task.config.task} gives {len(tokens) // seq_len}; lower calibration_samples or "
            "calibration_seq_len"
        )
    return torch.tensor(tokens[: samples * seq_len], dtype=torch.int64).view(samples, seq_len)


def token_stream(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, at_least: int | None = None) -> list[int]:
    """Token ids of ``texts`` joined by blank lines and tokenised as one text, at least ``at_least`` of them.

    Special tokens that the tokenizer puts before a text (LLaMA's BOS) stand once, at the start; this is
    how GPTQ, SparseGPT and Wanda read wikitext-2. Fewer tokens come back only where the texts have no more.
    """
    remaining = iter(texts)
    taken: list[str] = []
    characters = 0
    budget = float("inf") if at_least is None else 6 * at_least
    while True:
        for text in remaining:
            taken.append(text)
            characters += len(text)
            if characters >= budget:
                break
        tokens = tokenizer("\n\n".join(taken), verbose=False)["input_ids"] if taken else []
        # The last tokens might be others if the text went on, hence the margin.
        if characters < budget or len(tokens) >= at_least + 64:
            break
        budget *= 2
    return tokens


def check_ids(ids: Iterable[int], rows: int) -> None:
    """Refuses token ids that an embedding of so many rows does not have: on a GPU they end the whole process.

    Raises:
        UserError: naming the largest.
    """
    largest = max(ids, default=0)
    if largest >= rows:
        raise UserError(
            f"the text has token {largest}, but the model's embedding has {rows} rows; tokenizer and model do not"
            " belong together, or tokens were added without resizing the embedding"
        )


def shuffled(rows: Sequence[Any], seed: int) -> Iterator[Any]:
    """The rows in an order by ``seed``, read as they are taken."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return (rows[index] for index in order)


def _training_docs(task: Task) -> Sequence[Any]:
    with quiet():
        docs = task.training_docs() if task.has_training_docs() else None
    if not docs:
        name = task.config.task
        if not has_training_split(task):
            raise UserError(f"{name} has no training split (its definition names none); train on another task")
        raise UserError(f"{name} has no training rows; give a data_dir with its train split")
    return docs


def _texts(task: Task, docs: Iterable[Any]) -> Iterator[str]:
    seen = set()
    for doc in docs:
        text = _text(task, doc)
        if text not in seen:
            seen.add(text)
            yield text


def _text(task: Task, doc: Any) -> str:
    if task.config.task == "boolq":
        return doc["passage"]
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return task.doc_to_target(doc)
    return prompt(task, doc) + gold_continuation(task, doc)

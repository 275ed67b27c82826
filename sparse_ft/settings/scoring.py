"""The parameters of scoring."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self

from sparse_ft.errors import UserError
from sparse_ft.settings.corpora import TASK, corpus_problem, corpus_words
from sparse_ft.settings.field import Settings, setting

__all__ = ["PUBLISHED", "TASK_TEXT", "ScoringSettings", "read_scored", "scored_text", "with_shots"]

AUTO = "auto"
# How perplexity is measured: as the tables of GPTQ, SparseGPT and Wanda give it; on the text of the cell's own task.
PUBLISHED = {"perplexity_corpus": "wikitext2", "perplexity_seq_len": 2048, "perplexity_tokens": None}
TASK_TEXT = {"perplexity_corpus": TASK, "perplexity_seq_len": 256, "perplexity_tokens": 16384}
_SCORED = re.compile(r"([\w.-]+)(?::(\d+))?")  # metrics are called by the name; what follows the colon are examples


def read_scored(text: str) -> tuple[str, ...]:
    """Tasks as people list them, ``piqa, mmlu:5``, sorted and each once; none of them for ``none``.

    Raises:
        UserError: a word that names no task.
    """
    words = sorted({word.strip() for word in text.split(",")})
    if words == ["none"]:
        return ()
    if wrong := [word for word in words if not _SCORED.fullmatch(word)]:
        raise UserError(
            f"score has '{wrong[0]}'; list tasks and groups of lm-eval, piqa,arc_easy,mmlu:5 (:5 for five examples in"
            " the prompt), or write none."
        )
    return tuple(words)


def scored_text(words: Collection[str]) -> str:
    """The list that `read_scored` reads back."""
    return ",".join(words) or "none"


def with_shots(word: str) -> tuple[str, int | None]:
    """The task of a word of `read_scored`, and the examples in its prompt; None for the task's own number."""
    name, shots = _SCORED.fullmatch(word).groups()
    return name, None if shots is None else int(shots)


@dataclass(frozen=True)
class ScoringSettings(Settings):
    """How much is scored, and how."""

    score: tuple[str, ...] = setting(
        (),
        "tasks and groups of lm-eval to score beside the task that was trained, comma-separated; mmlu:5 puts five"
        " examples into the prompt.",
        read=read_scored,
        write=scored_text,
        needed=True,
        later=True,
    )
    chat_template: bool = setting(
        False,
        "put questions into the chat template of the model's tokenizer, in training on the task and in scoring, as"
        " lm-eval's apply_chat_template.",
        later=True,
    )
    eval_limit: int | None = setting(None, "score this many examples, or none for all.", least=1)
    score_limit: int | Literal["auto"] | None = setting(
        AUTO, "examples of each task of score, or none for all; auto is eval_limit.", least=1, later=True
    )
    eval_batch_size: int | Literal["auto"] = setting("auto", "sequences scored at a time, or auto.", least=1)
    num_fewshot: int | None = setting(
        None, "examples in the prompt, or none for the task's own number.", least=0, named=True, behind="num_fewshot"
    )
    perplexity_seq_len: int | Literal["auto"] = setting(
        AUTO, "tokens of each window of held-out text; auto is 256, or the papers' 2048.", least=2
    )
    perplexity_tokens: int | Literal["auto"] | None = setting(
        AUTO,
        "tokens of held-out text to measure perplexity on; 0 leaves it out, none takes all, auto is 16384, or all that"
        " the papers take.",
        least=0,
    )
    perplexity_corpus: str = setting(
        AUTO,
        "task (the task's held-out texts), wikitext2, c4, fineweb_edu (of data_dir/corpora or the hub), or a text file;"
        " auto is wikitext2 as the papers read it where it can be had and neither of the others is given, else task.",
        path=(AUTO, *corpus_words()),
        named=True,
        behind="versions",
    )
    share_contexts: bool = setting(
        False,
        "read the answers to one question after one context; faster, but the last digits of log-likelihoods then"
        " differ from lm-eval's.",
    )
    keep_samples: bool = setting(False, "keep what the model answered to every question, as an artifact.", result=False)

    @property
    def limit_beside(self) -> int | None:
        """How many examples of each task of ``score`` are scored; None: all."""
        return self.eval_limit if self.score_limit == AUTO else self.score_limit

    @property
    def leaves_perplexity_open(self) -> bool:
        """Whether nothing is said of what perplexity is measured on."""
        return all(getattr(self, name) == AUTO for name in TASK_TEXT)

    def settled(self) -> Self:
        """The same with what is said of perplexity; ``auto`` is the task's own text. Whether that of the papers can be
        had is asked before: see `sparse_ft.cell.perplexity.usual_perplexity`."""
        return replace(self, **{name: usual for name, usual in TASK_TEXT.items() if getattr(self, name) == AUTO})

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one sentence each."""
        yield from super().problems()
        if isinstance(self.eval_batch_size, str) and self.eval_batch_size != "auto":
            yield f"eval_batch_size is '{self.eval_batch_size}'; it must be auto, or a number."
        if self.score_limit != AUTO and not self.score:
            yield f"score_limit is {self.score_limit}, and score is none; give score too, or leave it out."
        for name in ("score_limit", "perplexity_seq_len", "perplexity_tokens"):
            if isinstance(value := getattr(self, name), str) and value != AUTO:
                yield f"{name} is '{value}'; it must be auto, or a number."
        problem = corpus_problem("perplexity_corpus", self.settled().perplexity_corpus)
        if self.perplexity_tokens != 0 and problem:
            yield problem

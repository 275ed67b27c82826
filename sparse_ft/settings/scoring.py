"""The parameters of scoring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sparse_ft.settings.corpora import corpus_problem, corpus_words
from sparse_ft.settings.field import Settings, setting

__all__ = ["ScoringSettings"]


@dataclass(frozen=True)
class ScoringSettings(Settings):
    """How much is scored, and how."""

    eval_limit: int | None = setting(None, "score this many examples, or none for all.", least=1)
    eval_batch_size: int | Literal["auto"] = setting("auto", "sequences scored at a time, or auto.", least=1)
    num_fewshot: int | None = setting(
        None, "examples in the prompt, or none for the task's own number.", least=0, named=True
    )
    perplexity_seq_len: int = setting(256, "tokens of each window of held-out text.", least=2)
    perplexity_tokens: int | None = setting(
        16384, "tokens of held-out text to measure perplexity on; 0 leaves it out, none takes all.", least=0
    )
    perplexity_corpus: str = setting(
        "task",
        "task (the task's held-out texts), wikitext2, c4, fineweb_edu (of data_dir/corpora or the hub), or"
        " a text file.",
        path=corpus_words(),
        named=True,
    )
    share_contexts: bool = setting(
        False,
        "read the answers to one question after one context; faster, but the last digits of log-likelihoods then"
        " differ from lm-eval's.",
    )
    keep_samples: bool = setting(False, "keep what the model answered to every question, as an artifact.", result=False)

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one sentence each."""
        yield from super().problems()
        if isinstance(self.eval_batch_size, str) and self.eval_batch_size != "auto":
            yield f"eval_batch_size is '{self.eval_batch_size}'; it must be auto, or a number."
        problem = corpus_problem("perplexity_corpus", self.perplexity_corpus)
        if self.perplexity_tokens != 0 and problem:
            yield problem

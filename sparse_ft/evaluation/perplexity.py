"""Perplexity of running text, by the windows that GPTQ, SparseGPT and Wanda report for wikitext-2."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.task import Task
from torch.nn import functional

from sparse_ft.errors import UserError
from sparse_ft.evaluation.batches import rows_that_fit
from sparse_ft.evaluation.finite import NonFiniteScoresError
from sparse_ft.evaluation.standard_errors import ratio_standard_error
from sparse_ft.progress import SILENT, Progress
from sparse_ft.settings.corpora import CORPORA, TASK, corpus_problem
from sparse_ft.tasks.corpora import held_out_rows
from sparse_ft.tasks.definitions import eval_split, local_source
from sparse_ft.tasks.examples import check_ids, held_out_texts, token_stream

__all__ = ["Perplexity", "corpus_texts", "perplexity"]


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with what it was measured on; the value means nothing without the rest."""

    value: float  # infinity where the exp of a finite loss is above every float
    loss: float  # mean negative log-likelihood of a token, in nats
    seq_len: int  # tokens of a window; the first of each is context only
    windows: int
    tokens: int  # predicted tokens: windows * (seq_len - 1)
    loss_stderr: float  # of the mean over windows; NaN for one window

    @property
    def stderr(self) -> float:
        """Standard error of ``value``: the loss's, times the slope of exp."""
        return self.value * self.loss_stderr


def corpus_texts(corpus: str, task: Task) -> tuple[str, Iterable[str]]:
    """A name for the protocol, and the texts, of a perplexity corpus.

    Args:
        corpus: ``task`` for the held-out texts of ``task``; ``wikitext2`` or ``c4`` for what the papers read of them,
            from ``corpora/`` in the task's folder or from the hub; else the path of a UTF-8 text file.

    Raises:
        UserError: the hub cannot be reached, or there is no such file.
    """
    if corpus == TASK:
        return f"{task.config.task}/{eval_split(task)}", held_out_texts(task)
    if corpus in CORPORA:
        return held_out_rows(corpus, local_source(task))
    path = Path(corpus).expanduser()
    if problem := corpus_problem("perplexity_corpus", corpus):
        raise UserError(problem)
    try:
        return path.name, [path.read_text(encoding="utf-8-sig")]
    except UnicodeDecodeError as error:
        raise UserError(
            f"perplexity_corpus {corpus} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None


@torch.inference_mode()
def perplexity(
    model: torch.nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    seq_len: int,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    progress: Progress = SILENT,
) -> Perplexity:
    """Perplexity of ``texts``, joined by blank lines and cut into windows without overlap.

    Each window is read by itself and its first token is not scored; a rest shorter than a window is left
    out, unless the whole text is shorter, and then it is the one window. With ``texts`` the lines of
    wikitext-2's test split and ``seq_len`` 2048 this is the protocol of the LLaMA tables in GPTQ
    (arXiv:2210.17323), SparseGPT (2301.00774) and Wanda (2306.11695).

    Args:
        model: a causal language model in eval mode.
        tokenizer: its tokenizer; what it puts before a text stands once, at the start.
        texts: the corpus.
        seq_len: tokens of a window.
        max_tokens: about how much to read, rounded up to whole windows; None for all of it.
        batch_size: windows at once; None for what fits.
        progress: told the windows done.

    Raises:
        UserError: ``seq_len`` is under 2, the corpus has fewer than 2 tokens, or a token is outside the embedding.
        NonFiniteScoresError: the loss is NaN or infinite.
    """
    if seq_len < 2:
        raise UserError(f"perplexity_seq_len is {seq_len}; it must be 2 or more")
    wanted = None if max_tokens is None else -(-max_tokens // seq_len) * seq_len
    tokens = token_stream(texts, tokenizer, wanted)
    check_ids(tokens, model.get_input_embeddings().weight.shape[0])
    windows = _windows(tokens if wanted is None else tokens[:wanted], seq_len)
    device = next(model.parameters()).device
    rows = batch_size or rows_that_fit(model, windows.shape[1])
    losses: list[float] = []  # nats of a window
    progress.start("perplexity", len(windows), "windows")
    for batch in windows.split(rows):
        batch = batch.to(device)
        logits = model(input_ids=batch, use_cache=False).logits
        for row, targets in zip(logits[:, :-1], batch[:, 1:], strict=True):  # float32 copies of one row only
            losses.append(functional.cross_entropy(row.float(), targets, reduction="none").double().sum().item())
        progress.advance(len(batch))
    progress.stop()
    scored = windows.shape[1] - 1
    count = windows.shape[0] * scored
    loss = sum(losses) / count
    if not math.isfinite(loss):
        raise NonFiniteScoresError(f"the loss on running text is {loss}; the model has no perplexity")
    value = math.exp(loss) if loss < 700 else math.inf
    error = ratio_standard_error(losses, [scored] * len(losses))
    return Perplexity(value, loss, windows.shape[1], windows.shape[0], count, error)


def _windows(tokens: Sequence[int], seq_len: int) -> torch.Tensor:
    """Token ids as int64 ``[windows, seq_len]``."""
    if len(tokens) < 2:
        raise UserError(f"the perplexity corpus has {len(tokens)} tokens; it must have 2 or more")
    length = min(seq_len, len(tokens))
    count = len(tokens) // length
    return torch.tensor(tokens[: count * length], dtype=torch.int64).view(count, length)

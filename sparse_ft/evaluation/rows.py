"""Requests laid out as rows of tokens for one forward pass, with the places where answers are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

__all__ = ["Request", "Row", "branched_rows", "model_inputs", "single_rows"]

Request = tuple[Any, list[int], list[int]]
"""What was asked (lm-eval's key, or None), tokens of the context, tokens of the answer."""


@dataclass(frozen=True)
class Row:
    """One row of a batch.

    Attributes:
        tokens: what is fed: the context, and after it each answer without its last token.
        reads: (number of the request, positions whose logits predict its answer's tokens).
        context: tokens that all branches see.
        branches: (first, end) of each answer's tokens; empty where the row is one plain sequence.
    """

    tokens: tuple[int, ...]
    reads: tuple[tuple[int, tuple[int, ...]], ...]
    context: int = 0
    branches: tuple[tuple[int, int], ...] = ()


def single_rows(requests: Sequence[Request], max_length: int, chosen: Sequence[int] | None = None) -> list[Row]:
    """A row for each different input, cut on the left to ``max_length``, longest first: lm-eval's way.

    Requests that feed the same tokens, because their answers differ in the last one only, share a row.
    ``chosen`` are the numbers of the requests to take; all by default.
    """
    numbers: dict[tuple[int, ...], list[int]] = {}
    for number in range(len(requests)) if chosen is None else chosen:
        _, context, answer = requests[number]
        numbers.setdefault(tuple((context + answer)[-(max_length + 1) : -1]), []).append(number)
    rows = []
    for tokens, sharing in numbers.items():
        # Position p predicts token p + 1: an answer of n tokens is read at the last n positions.
        ends = [(number, range(len(tokens) - len(requests[number][2]), len(tokens))) for number in sharing]
        rows.append(Row(tokens, tuple((number, tuple(positions)) for number, positions in ends)))
    return sorted(rows, key=_longest_first)


def branched_rows(requests: Sequence[Request], max_length: int, window: int | None = None) -> list[Row]:
    """Rows in which a context stands once and the answers to it are branches that do not see each other.

    HellaSwag's four endings are read in one row of context and endings, half the tokens of four. What
    does not fit into ``max_length`` or the ``window`` of the model's attention, and what has one answer,
    becomes a row as in :func:`single_rows`. Those come last.
    """
    fits = max_length if window is None else min(max_length, window)
    same: dict[tuple[int, ...], list[int]] = {}
    for number, (_, context, _) in enumerate(requests):
        same.setdefault(tuple(context), []).append(number)
    rows, alone = [], []
    for context, numbers in same.items():
        answers = [requests[number][2] for number in numbers]
        if len({tuple(answer[:-1]) for answer in answers}) == 1 or len(context) + max(map(len, answers)) > fits:
            alone.extend(numbers)
            continue
        tokens, reads, branches = list(context), [], []
        for number, answer in zip(numbers, answers, strict=True):
            first = len(tokens)
            tokens.extend(answer[:-1])
            reads.append((number, (len(context) - 1, *range(first, len(tokens)))))
            branches.append((first, len(tokens)))
        rows.append(Row(tuple(tokens), tuple(reads), len(context), tuple(branches)))
    return [*sorted(rows, key=_longest_first), *single_rows(requests, max_length, alone)]


def model_inputs(rows: Sequence[Row], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Keyword arguments of the model for a batch of rows, padded on the right by 0.

    Plain rows need nothing but ``input_ids``, int64 ``[rows, length]``. With branches there are also
    ``position_ids``, in which every branch goes on where the context ended, and ``attention_mask``, added
    to the attention scores, of ``dtype`` ``[rows, 1, length, length]``: 0 for what a token sees (the
    context, its own branch), the lowest number elsewhere.
    """
    tokens = pad_sequence([torch.tensor(row.tokens) for row in rows], batch_first=True)
    if not any(row.branches for row in rows):
        return {"input_ids": tokens}
    length = tokens.shape[1]
    places = torch.arange(length).repeat(len(rows), 1)
    branch = torch.zeros_like(tokens)
    for index, row in enumerate(rows):
        for number, (first, end) in enumerate(row.branches, 1):
            branch[index, first:end] = number
            places[index, first:end] = torch.arange(row.context, row.context + end - first)
    seen = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    seen &= torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return {"input_ids": tokens, "position_ids": places, "attention_mask": mask[:, None]}


def _longest_first(row: Row) -> tuple[int, tuple[int, ...]]:
    return -len(row.tokens), row.tokens

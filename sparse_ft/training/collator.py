"""Batches of examples, with their answers at one edge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["IGNORED", "AnswerCollator"]

IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class AnswerCollator:
    """Batches examples so that all answers end together at the right edge.

    Padding goes to the left; the model then needs logits for the last K+1 positions only (K: the longest
    answer of the batch), a large part of the work where the vocabulary is large. Position ids start at 0 at
    each example's first token, so padding changes nothing.

    Returns (for B examples, T the longest):
        input_ids int64 [B, T], attention_mask int64 [B, T], position_ids int64 [B, T],
        labels int64 [B, K+1] (-100 outside the answer), logits_to_keep = K+1.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(example["input_ids"]) for example in examples)
        keep = 1 + max(len(example["input_ids"]) - example["answer_start"] for example in examples)
        ids = torch.full((len(examples), longest), self.pad_token_id)
        attention = torch.zeros(len(examples), longest, dtype=torch.int64)
        labels = torch.full((len(examples), keep), IGNORED)
        for row, example in enumerate(examples):
            tokens = torch.tensor(example["input_ids"])
            answer = tokens[example["answer_start"] :]
            ids[row, longest - len(tokens) :] = tokens
            attention[row, longest - len(tokens) :] = 1
            labels[row, keep - len(answer) :] = answer
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        return {
            "input_ids": ids,
            "attention_mask": attention,
            "position_ids": positions,
            "labels": labels,
            "logits_to_keep": keep,
        }

"""Batches of examples, with their answers at one edge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["IGNORED", "AnswerCollator", "for_model"]

IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class AnswerCollator:
    """Batches examples so that all answers end together at the right edge.

    Padding goes to the left; the model then needs logits for the last K+1 positions only (K: the longest
    answer of the batch), a large part of the work where the vocabulary is large. Position ids start at 0 at
    the first token of each example, and of each document in a packed one, so padding changes nothing.

    Returns (for B examples, T the longest):
        input_ids int64 [B, T], attention_mask int64 [B, T] (1: no padding), position_ids int64 [B, T],
        labels int64 [B, K+1] (-100 outside the answer and where an example leaves one out), logits_to_keep = K+1;
        of windows of several documents also ``packed``, and then a model is called with what `for_model` makes of it.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(example["input_ids"]) for example in examples)
        keep = 1 + max(len(example["input_ids"]) - example["answer_start"] for example in examples)
        ids = torch.full((len(examples), longest), self.pad_token_id)
        attention = torch.zeros(len(examples), longest, dtype=torch.int64)
        labels = torch.full((len(examples), keep), IGNORED)
        packed = any(len(example.get("documents", ())) > 1 for example in examples)
        positions = torch.zeros(len(examples), longest, dtype=torch.int64)
        for row, example in enumerate(examples):
            tokens = torch.tensor(example["input_ids"])
            answer = tokens[example["answer_start"] :]
            pad = longest - len(tokens)
            ids[row, pad:] = tokens
            attention[row, pad:] = 1
            labels[row, keep - len(answer) :] = answer
            for position in example.get("left_out", ()):
                labels[row, keep - len(tokens) + position] = IGNORED
            # In a packed batch padding is a document as well: it is told apart by its positions alone.
            parts = [pad] * packed + list(example.get("documents", ()) or [len(tokens)])
            positions[row, longest - sum(parts) :] = torch.cat([torch.arange(part) for part in parts])
        batch = {
            "input_ids": ids,
            "attention_mask": attention,
            "position_ids": positions,
            "labels": labels,
            "logits_to_keep": keep,
        }
        return batch | {"packed": True} if packed else batch


def for_model(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is called with: a batch of `AnswerCollator`, in packed ones without the mask.

    Without a mask (and a cache) transformers lets every token see those before it whose positions lead up to its own
    (``masking_utils.find_packed_sequence_indices``): its document's, in the model's own pattern of attention.
    """
    left_out = ("packed", "attention_mask") if batch.get("packed") else ()
    rest = {name: value for name, value in batch.items() if name not in left_out}
    return rest | {"use_cache": False} if left_out else rest

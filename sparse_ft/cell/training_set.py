"""What a cell is trained on: the sequences that its steps consume, in their order, and what the protocol says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean
from typing import Any

from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.corpora import TASK
from sparse_ft.settings.training_data import LOSS_ON
from sparse_ft.tasks.encoding import encoded
from sparse_ft.tasks.examples import Example, task_examples
from sparse_ft.tasks.packing import mixed, packed, pieces
from sparse_ft.tasks.rows import MESSAGES, PROMPTS, TEXT

__all__ = ["TrainingSet", "training_set"]

_LEARNED = {TASK: "the answer", PROMPTS: "the completion", MESSAGES: "the assistant's turns", TEXT: "all tokens"}


@dataclass(frozen=True)
class TrainingSet:
    """Sequences to train on.

    Attributes:
        examples: as many as the steps consume, or fewer where there are no more: they come again then.
        protocol: which rows they are of, of which shape, and what of them is learned.
    """

    examples: list[Example]
    protocol: dict[str, Any]


def training_set(cell: CellConfig, bench: Workbench, limit: int | None = None) -> TrainingSet:
    """What the cell is trained on.

    Args:
        cell: which rows, and how many steps.
        bench: finds rows, task and tokenizer.
        limit: at most so many sequences; None: what the steps consume.

    Raises:
        UserError: rows that cannot be had, or that cannot be trained on; names the row.
    """
    count = limit or cell.examples_needed
    if cell.mix is None:
        sequences, protocol = _source(cell, cell.train_data, bench)
        examples = list(islice(sequences, count))
    else:
        examples, protocol = _mixed(cell, bench, count)
    if cell.packing and examples:
        protocol["packing_documents"] = sum(len(example.documents) for example in examples)
        protocol["packing_filled"] = round(fmean(len(e.input_ids) for e in examples) / cell.max_seq_len, 4)
    return TrainingSet(examples, protocol)


def _mixed(cell: CellConfig, bench: Workbench, count: int | None) -> tuple[list[Example], dict[str, Any]]:
    """The sequences of both sources, the second's as many as its weight says; with epochs, beside all of the first."""
    weight = cell.mix_weight
    (first, protocol), (second, said) = (_source(cell, source, bench) for source in cell.sources)
    others = 0 if count is None else round(weight * count)
    own = list(islice(first, None if count is None else count - others))
    if count is None:
        count, others = len(own), round(len(own) * weight / (1 - weight))
        count += others
    added = list(islice(second, others))
    for source, found, wanted in zip(cell.sources, (own, added), (count - others, others), strict=True):
        if wanted and not found:
            raise UserError(f"{source} has nothing that can be trained on")
    protocol |= {f"mix{name.removeprefix('data')}" if "data" in name else f"mix_{name}": said[name] for name in said}
    protocol["mix_sequences"] = f"{others} of {count}"
    return mixed(own, added, (count - others, others), cell.seed), protocol


def _source(cell: CellConfig, source: str, bench: Workbench) -> tuple[Iterator[Example], dict[str, Any]]:
    """The sequences of one source, and what is said of them."""
    tokenizer, length = bench.tokenizer(cell.model), cell.max_seq_len
    everything = cell.loss_on != LOSS_ON[0]
    if source == TASK:
        shape, sequences = TASK, task_examples(bench.task(cell), tokenizer, length, cell.seed, cell.chat_template)
        if everything:
            sequences = (replace(example, answer_start=1) for example in sequences)
        protocol = {"data": TASK}
    else:
        rows = bench.rows(source, cell.data_dir)
        shape = rows.shape
        sequences = encoded(rows, tokenizer, length, everything, cell.seed, cut=rows.running or cell.packing)
        if rows.running and not cell.packing:
            sequences = pieces(sequences, length)
        protocol = {"data": source, "data_shape": shape, "data_rows": len(rows.rows)}
    if cell.packing:
        sequences = packed(sequences, length, cut=shape == TEXT)
    return sequences, protocol | {"loss_on": _LEARNED[TEXT if everything else shape]}

"""Training examples in ModelZoo's HDF5: the sequences that `sparse_ft.tasks` makes, so the prompts of scoring."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from sparse_ft.errors import UserError
from sparse_ft.files import atomic_folder
from sparse_ft.models.cerebras.mdl import hdf5
from sparse_ft.progress import SILENT, Progress

__all__ = ["TokenExample", "write_examples"]

_PART = 4096  # examples in a file


class TokenExample(Protocol):
    """A sequence whose loss is taken from position ``answer_start`` on (`sparse_ft.tasks.examples.Example`)."""

    input_ids: list[int]
    answer_start: int


def write_examples(
    examples: Sequence[TokenExample],
    folder: str | Path,
    seq_len: int,
    pad_token_id: int,
    batch_size: int = 1,
    progress: Progress = SILENT,
) -> int:
    """Writes examples as ``GptHDF5MapDataProcessor`` reads them; returns their number.

    Each file has a dataset ``data``, int32 ``[N, 3, seq_len]``: input ids, loss mask, labels, and the attribute
    ``n_examples``. Position i predicts token i + 1, so labels are the ids shifted by one and the mask is 1 where
    the label belongs to the answer. Sequences are padded on the right; under a causal mask padding is not seen.

    Args:
        seq_len: tokens of a row, the same for all: a wafer compiles for one shape.
        batch_size: of the training; fewer examples than one batch would train nothing.

    Raises:
        UserError: no examples, fewer than a batch, or one that is longer than ``seq_len`` + 1.
    """
    if len(examples) < batch_size:
        raise UserError(f"There are {len(examples)} training examples, a batch needs {batch_size}.")
    longest = max(len(example.input_ids) for example in examples)
    if longest > seq_len + 1:
        raise UserError(f"An example has {longest} tokens; max_seq_len is {seq_len}. Raise it, or cut the prompts.")
    h5py = hdf5()
    progress.start("write HDF5", len(examples), "examples")
    with atomic_folder(folder) as target:
        for part, first in enumerate(range(0, len(examples), _PART)):
            rows = np.stack([_row(example, seq_len, pad_token_id) for example in examples[first : first + _PART]])
            with h5py.File(target / f"part_{part:05d}.h5", "w") as file:
                file.create_dataset("data", data=rows, chunks=(1, 3, seq_len), compression="gzip")
                file.attrs["n_examples"] = len(rows)
            progress.advance(len(rows))
    progress.stop()
    return len(examples)


def _row(example: TokenExample, seq_len: int, pad_token_id: int) -> np.ndarray:
    tokens = np.asarray(example.input_ids, dtype=np.int32)
    row = np.full((3, seq_len), pad_token_id, dtype=np.int32)
    row[1] = 0
    count = len(tokens) - 1
    row[0, :count] = tokens[:-1]
    row[1, max(0, example.answer_start - 1) : count] = 1
    row[2, :count] = tokens[1:]
    return row

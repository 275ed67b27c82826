"""The modes of a cell, which say what is trained: one row each. Whoever asks what a mode does asks its row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = [
    "DENSE",
    "FULL",
    "MODES",
    "NOT_TUNED",
    "PRUNED",
    "SPARSE_MODES",
    "SPARSE_TO_DENSE",
    "SPARSE_TO_SPARSE",
    "TRAINED_MODES",
    "Mode",
    "is_tuned",
    "mode_label",
]


@dataclass(frozen=True)
class Mode:
    """One way to fine-tune, or not to.

    Attributes:
        name: as flags and files spell it.
        short: in names of runs.
        label: in tables and figures.
        sentence: ends "up to 50 % by magnitude, ...", for people.
        dashes: line style of matplotlib: solid where the merged model is sparse.
        lora: whether an adapter is trained, and not the weights themselves.
        masked_base: whether the weights under it are pruned.
        masked_update: whether the mask also holds for what is learned.
        trains: whether anything is trained at all.
    """

    name: str
    short: str
    label: str
    sentence: str
    dashes: Any
    lora: bool
    masked_base: bool
    masked_update: bool
    trains: bool = True

    @property
    def trains_weights(self) -> bool:
        """Whether the weights themselves are trained."""
        return self.trains and not self.lora

    @property
    def keeps_zeros(self) -> bool:
        """Whether the merged model is promised to be as sparse as its mask."""
        return self.masked_base and self.masked_update

    @property
    def loses_zeros(self) -> bool:
        """Whether the merge fills the zeros of a pruned model."""
        return self.masked_base and not self.masked_update


DENSE = Mode(
    "dense",
    "dense",
    "dense",
    "fine-tuned dense",
    "-",
    lora=True,
    masked_base=False,
    masked_update=False,
)
SPARSE_TO_DENSE = Mode(
    "sparse_to_dense",
    "s2d",
    "sparse to dense",
    "with a dense adapter (the merged model is then dense)",
    (0, (4, 1.8)),
    lora=True,
    masked_base=True,
    masked_update=False,
)
SPARSE_TO_SPARSE = Mode(
    "sparse_to_sparse",
    "s2s",
    "sparse to sparse",
    "trained sparse to sparse",
    "-",
    lora=True,
    masked_base=True,
    masked_update=True,
)
FULL = Mode(
    "full",
    "full",
    "full fine-tuning",
    "with all weights trained under the mask",
    (0, (1, 1.4)),
    lora=False,
    masked_base=True,
    masked_update=True,
)
PRUNED = Mode(
    "pruned",
    "pruned",
    "pruned, not tuned",
    "pruned and not fine-tuned",
    (0, (6, 1.2, 1, 1.2)),
    lora=False,
    masked_base=True,
    masked_update=True,
    trains=False,
)
MODES = {mode.name: mode for mode in (DENSE, SPARSE_TO_DENSE, SPARSE_TO_SPARSE, FULL, PRUNED)}
NOT_TUNED = "not tuned"  # the label of the dense model as it is
TRAINED_MODES = tuple(name for name, mode in MODES.items() if mode.trains)
SPARSE_MODES = tuple(name for name, mode in MODES.items() if mode.lora and mode.masked_base)


def mode_label(name: str, sparsity: float | None = None) -> str:
    """A mode's label; of a name that is none, the name (published numbers, runs of other versions). At a ``sparsity``
    of 0 what trains nothing is not pruned either."""
    if sparsity == 0 and not is_tuned(name):
        return NOT_TUNED
    return MODES[name].label if name in MODES else str(name)


def is_tuned(name: str) -> bool:
    """Whether a mode fine-tunes; of a name that is none (published numbers, other versions' runs), that it does."""
    return name not in MODES or MODES[name].trains

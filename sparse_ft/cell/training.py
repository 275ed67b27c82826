"""One training: what a trainer is given, what it gives back, and what a trainer is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sparse_ft.cell.clock import Clock
from sparse_ft.cell.early_stopping import Judge
from sparse_ft.cell.group_model import GroupModel
from sparse_ft.cell.result import CellResult
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.progress import Progress
from sparse_ft.settings.cell import CellConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparse_ft.cell.scores import Scores
    from sparse_ft.tasks.examples import Example

__all__ = ["UNWATCHED", "Trained", "Trainer", "Training", "Watch"]


@dataclass(frozen=True)
class Watch:
    """Whoever started a training, and what it wants of it while it goes on.

    Attributes:
        run_id: of the run that the cell is logged to; a cluster's job is labelled with it.
        judge: of a search: decides at some steps whether training goes on, from the loss on the task's answers.
        reduced: the try before this one ran out of memory, and the cell's batch is smaller since.
    """

    run_id: str = ""
    judge: Judge | None = None
    reduced: bool = False


UNWATCHED = Watch()


@dataclass(frozen=True)
class Training:
    """What a trainer is given.

    Attributes:
        cell: what to train, and how.
        model: with the weights of ``start`` under ``masks``; trained and merged in place, or given the merged weights.
        base: the cell's base model.
        start: the checkpoint that training begins with: ``base``, or one that belongs to the masks.
        masks: None: all weights are kept.
        examples: as many as the steps consume, in their order.
        tokenizer: of the model.
        folder: the cell's; the merged checkpoint goes into ``target``.
        scores: scores the model midway.
        clock: told the stages convert, train, merge and save.
        result: gets what the trainer measures.
        progress: told how far it is, and what is measured on the way.
        watch: see `Watch`.
        whole: the masks as they were made, of experts too that are gone from ``start``; None: as ``masks``.
        teacher: the weights that it learns from beside the examples; None: from these alone.
    """

    cell: CellConfig
    model: PreTrainedModel | GroupModel
    base: Checkpoint
    start: Checkpoint
    masks: MaskSet | None
    examples: Sequence[Example]
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    scores: Scores
    clock: Clock
    result: CellResult
    progress: Progress
    watch: Watch
    whole: MaskSet | None = None
    teacher: Checkpoint | None = None

    @property
    def target(self) -> Path:
        """The merged checkpoint's folder."""
        return self.folder / "merged"


@dataclass(frozen=True)
class Trained:
    """What a trainer gives back; the merged checkpoint is in `Training.target`.

    Attributes:
        model: plain, in memory, with the merged weights.
        base_violations: masked weights of the base under its adapter that are not zero; 0 where the mode lets none.
        exact: the merged model computes what was trained, bit for bit.
        adapter: where it is not: the loss on the answers before the merge; None where it was not measured.
    """

    model: PreTrainedModel | GroupModel
    base_violations: int = 0
    exact: bool = False
    adapter: Mapping[str, float] | None = None


class Trainer(Protocol):
    """Trains cells and merges what it trained. Workers get it by pickle.

    Attributes:
        name: as settings spell it.
        can_stop: a `Judge` can end a training midway.
        takes_all: a training needs all that there is, so cells run one after another in the driver's process.
    """

    name: str
    can_stop: bool
    takes_all: bool

    def check(self, cell: CellConfig, checkpoint: Checkpoint) -> None:
        """Refuses a cell that it cannot train, before anything is made.

        Raises:
            UserError: in one line.
        """

    def missing(self) -> list[str]:
        """What its surroundings lack, one line each; empty where it can train."""

    def train(self, training: Training) -> Trained:
        """Trains, merges, and writes the merged checkpoint."""

"""Who trains a cell: from a masked model and examples to a merged checkpoint. An executor says where, a trainer how.

What trains is imported with the first training: a study is planned and checked without it.
"""

from __future__ import annotations

from sparse_ft.cell.group_model import GroupModel
from sparse_ft.cell.training import Trained, Training
from sparse_ft.lora.projections import chosen_projections
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.modes import MODES

__all__ = ["LOCAL", "UNTRAINED", "LocalTrainer"]


class LocalTrainer:
    """Trains in this process, on the cell's device, or in the cell's group. Model, adapter and merged model share their
    memory."""

    name, can_stop, takes_all = "local", True, False

    def check(self, cell: CellConfig, checkpoint: Checkpoint) -> None:
        """Refuses projections that the model does not have, and adapters that experts cannot take."""
        if MODES[cell.mode].lora:
            chosen_projections(cell, checkpoint.config, checkpoint.prunable)

    def missing(self) -> list[str]:
        """Nothing: whatever runs cells can train them."""
        return []

    def train(self, training: Training) -> Trained:
        """Trains with the Hugging Face Trainer and merges in place, layer by layer.

        Raises:
            StoppedEarly: the judge has seen enough.
            NonFiniteLossError: training diverged.
        """
        if training.cell.gpus_per_cell > 1:
            from sparse_ft.cell.group.training import train_in_group

            return train_in_group(training)
        from sparse_ft.cell.local import train_here

        return train_here(training)


LOCAL = LocalTrainer()


class _Untrained:
    """Stands in for a trainer where a mode trains nothing: the pruned model is written as it is."""

    name, can_stop, takes_all = "none", False, False

    def check(self, cell: CellConfig, checkpoint: Checkpoint) -> None:
        """There is nothing to refuse."""

    def missing(self) -> list[str]:
        """Nothing."""
        return []

    def train(self, training: Training) -> Trained:
        """Writes the model under its masks."""
        from sparse_ft.models.loading import save_model, saved_tokenizer

        with training.clock("save"):
            if isinstance(training.model, GroupModel):
                training.model.group.do("save", target=str(training.target.resolve()))
                return Trained(training.model, exact=True)
            save_model(
                training.model, saved_tokenizer(training.base.folder), training.target, progress=training.progress
            )
        return Trained(training.model, exact=True)


UNTRAINED = _Untrained()

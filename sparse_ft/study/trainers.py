"""How cells are trained: in the process that runs them, or on a Cerebras cluster."""

from __future__ import annotations

from sparse_ft.cell.trainer import LOCAL
from sparse_ft.cell.training import Trainer
from sparse_ft.errors import UserError
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.settings.executors import EXECUTORS

__all__ = ["make_trainer", "study_trainer"]


def make_trainer(name: str, cerebras: str | None = None) -> Trainer:
    """The trainer of that name (one of `sparse_ft.settings.commands.TRAINERS`).

    Args:
        name: of the trainer.
        cerebras: the settings file of a Cerebras; None takes the defaults.

    Raises:
        UserError: the settings file cannot be read.
    """
    if name == "cerebras":
        from sparse_ft.cerebras.trainer import CerebrasTrainer, load_settings

        return CerebrasTrainer(load_settings(cerebras))
    return LOCAL


def study_trainer(name: str, config: SweepConfig) -> Trainer:
    """The trainer of a study's cells.

    Raises:
        UserError: as `make_trainer`; or it takes all that there is, and the executor would run several cells at once.
    """
    trainer = make_trainer(name, config.cerebras)
    if trainer.takes_all and EXECUTORS[config.executor].several:
        raise UserError(
            f"trainer {name} runs with executor serial, not {config.executor}: one training takes the whole cluster "
            "that it was given."
        )
    return trainer

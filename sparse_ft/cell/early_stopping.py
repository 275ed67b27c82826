"""Stopping a training midway: a search scores its trials after some steps and ends the worse ones."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

__all__ = ["Judge", "StoppedEarly"]


class Judge(Protocol):
    """Decides at some steps of a training whether it goes on. ``rungs``: after which steps it is asked."""

    rungs: Collection[int]

    def __call__(self, step: int, loss: float) -> bool:
        """Takes the loss on the task's answers; True: stop."""


class StoppedEarly(Exception):
    """A judge has stopped the training; ``losses`` are the (step, loss) that it saw."""

    def __init__(self, losses: list[tuple[int, float]]):
        super().__init__(f"stopped at step {losses[-1][0]} with an evaluation loss of {losses[-1][1]:.4f}")
        self.losses = losses

"""Stopping a training midway: a search scores its trials after some steps and ends the worse ones."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch
from transformers import TrainerCallback

from sparse_ft.cell.clock import Clock
from sparse_ft.cell.scores import Scores

__all__ = ["Judge", "Rungs", "StoppedEarly"]


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


class Rungs(TrainerCallback):
    """Scores the model in the middle of its training, and raises `StoppedEarly` where the judge says so."""

    def __init__(self, judge: Judge, model: torch.nn.Module, scores: Scores, clock: Clock):
        self._judge, self._model, self._scores, self._clock = judge, model, scores, clock
        self.losses: list[tuple[int, float]] = []

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        if step not in self._judge.rungs:
            return
        with self._clock("eval"):  # the scorer puts the model back into training mode
            loss = self._scores(self._model, f"score at step {step}", beside=False, perplexity_tokens=0).metrics["loss"]
        self.losses.append((step, loss))
        if self._judge(step, loss):
            raise StoppedEarly(self.losses)

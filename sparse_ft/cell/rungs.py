"""Scores in the middle of a training, after which a judge may end it."""

from __future__ import annotations

import torch
from transformers import TrainerCallback

from sparse_ft.cell.clock import Clock
from sparse_ft.cell.early_stopping import Judge, StoppedEarly
from sparse_ft.cell.scores import Scores
from sparse_ft.progress import Progress

__all__ = ["RUNG_LOSS", "Rungs"]

RUNG_LOSS = "eval/loss_while_training"


class Rungs(TrainerCallback):
    """Scores the model in the middle of its training, and raises `StoppedEarly` where the judge says so.

    Args:
        judge: is told the losses.
        model: that is trained.
        scores: of the cell.
        clock: told what the scoring takes.
        progress: told the losses too, as they are measured.
    """

    def __init__(self, judge: Judge, model: torch.nn.Module, scores: Scores, clock: Clock, progress: Progress):
        self._judge, self._model, self._scores, self._clock = judge, model, scores, clock
        self._progress = progress
        self.losses: list[tuple[int, float]] = []

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        if step not in self._judge.rungs:
            return
        with self._clock("eval"):  # the scorer puts the model back into training mode
            loss = self._scores(self._model, f"score at step {step}", beside=False, perplexity_tokens=0).metrics["loss"]
        self.losses.append((step, loss))
        self._progress.measured(step, {RUNG_LOSS: loss})
        if self._judge(step, loss):
            raise StoppedEarly(self.losses)

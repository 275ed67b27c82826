"""Trains a cell in this process: adapter on, fine-tuned under the mask, merged, saved."""

from __future__ import annotations

import shutil

import torch

from sparse_ft.cell.live import named
from sparse_ft.cell.result import CellResult
from sparse_ft.cell.rungs import RUNG_LOSS, Rungs
from sparse_ft.cell.teaching import teaching
from sparse_ft.cell.training import Trained, Training
from sparse_ft.lora.merge import merge_all_lora_weights
from sparse_ft.lora.model import apply_sparse_lora, validate_sparsity_preserved
from sparse_ft.models.loading import save_model, saved_tokenizer
from sparse_ft.settings.modes import MODES
from sparse_ft.training import TrainingResult, train

__all__ = ["log_training", "train_here"]


def train_here(training: Training) -> Trained:
    """Trains with the Hugging Face Trainer and merges in place, layer by layer.

    Raises:
        StoppedEarly: the judge has seen enough.
        NonFiniteLossError: training diverged.
    """
    cell, masks, mode = training.cell, training.masks, MODES[training.cell.mode]
    clock, scores, result, progress = training.clock, training.scores, training.result, training.progress
    with clock("train"):
        torch.manual_seed(cell.seed)
        adapted = apply_sparse_lora(training.model, cell, cell.mode, masks, cell.seed)
        judge = training.watch.judge
        rungs = Rungs(judge, adapted, scores, clock, progress) if judge is not None and judge.rungs else None
        with teaching(cell, training.teacher, training.start, adapted, masks) as guide:
            trained = train(
                adapted,
                training.examples,
                cell,
                training.folder / "trainer",
                training.tokenizer.pad_token_id,
                progress=progress,
                callbacks=[rungs] if rungs else [],
                distillation=guide,
                report=lambda step, values: progress.measured(step, named("train", values)),
            )
    shutil.rmtree(training.folder / "trainer", ignore_errors=True)
    log_training(result, trained, timed=rungs is None)
    if rungs is not None:
        result.series[RUNG_LOSS] = rungs.losses
    if cell.keep != "none" and mode.lora:
        adapted.save_pretrained(training.folder / "adapter")
        result.artifacts.append((training.folder / "adapter", "adapter"))
    base_violations = 0
    if mode.loses_zeros:
        with adapted.disable_adapter():  # what this mode keeps sparse is the base under the adapter
            base_violations = sum(validate_sparsity_preserved(adapted, masks).values())
    with clock("eval_adapter"):
        # Of the other modes the trained model is the merged one, bit for bit: it is scored after the merge.
        adapter = None if mode.masked_update else scores.answers(adapted)
    with clock("merge"):
        merged = merge_all_lora_weights(adapted, cell.rounding, cell.seed, progress)
    with clock("save"):
        save_model(merged, saved_tokenizer(training.base.folder), training.target, progress=progress)
    return Trained(merged, base_violations, exact=mode.masked_update, adapter=adapter)


def log_training(result: CellResult, trained: TrainingResult, timed: bool) -> None:
    """Adds what a training gave and cost to a result; ``timed``: nobody scored in between."""
    measured = {"train/loss": trained.loss, "memory/peak_bytes": trained.peak_bytes}
    if timed:
        measured["train/tokens_per_second"] = trained.tokens_per_second
        measured["train/samples_per_second"] = trained.samples_per_second
    result.metrics.update({name: value for name, value in measured.items() if value is not None})
    result.series |= named("train", {"loss": trained.loss_curve, **trained.parts})
    result.protocol.update({f"train_{name}": value for name, value in trained.protocol.items()})
    result.protocol["train_untimed_steps"] = trained.warmup_steps_untimed

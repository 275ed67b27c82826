"""Who trains a cell: from a masked model and examples to a merged checkpoint. An executor says where, a trainer how."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_ft.cell.clock import Clock
from sparse_ft.cell.early_stopping import Judge, Rungs
from sparse_ft.cell.result import CellResult
from sparse_ft.cell.scores import Scores
from sparse_ft.cell.teaching import teaching
from sparse_ft.lora.merge import merge_all_lora_weights
from sparse_ft.lora.model import apply_sparse_lora, validate_sparsity_preserved
from sparse_ft.lora.projections import chosen_projections
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import save_model, saved_tokenizer
from sparse_ft.progress import Progress
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.modes import MODES
from sparse_ft.tasks.examples import Example
from sparse_ft.training import TrainingResult, train

__all__ = ["LOCAL", "UNTRAINED", "UNWATCHED", "LocalTrainer", "Trained", "Trainer", "Training", "Watch"]

Curves = Mapping[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class Watch:
    """Whoever started a training, and what it wants of it while it goes on.

    Attributes:
        run_id: of the run that the cell is logged to; a cluster's job is labelled with it.
        log: takes curves as they come, metric -> [(step, value)].
        judge: of a search: decides at some steps whether training goes on, from the loss on the task's answers.
        reduced: the try before this one ran out of memory, and the cell's batch is smaller since.
    """

    run_id: str = ""
    log: Callable[[Curves], None] = lambda curves: None
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
        progress: told how far it is.
        watch: see `Watch`.
        whole: the masks as they were made, of experts too that are gone from ``start``; None: as ``masks``.
        teacher: the weights that it learns from beside the examples; None: from these alone.
    """

    cell: CellConfig
    model: PreTrainedModel
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

    model: PreTrainedModel
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


class LocalTrainer:
    """Trains in this process, on the cell's device. Model, adapter and merged model share their memory."""

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
        cell, masks, mode = training.cell, training.masks, MODES[training.cell.mode]
        clock, scores, result = training.clock, training.scores, training.result
        with clock("train"):
            torch.manual_seed(cell.seed)
            adapted = apply_sparse_lora(training.model, cell, cell.mode, masks, cell.seed)
            judge = training.watch.judge
            rungs = Rungs(judge, adapted, scores, clock) if judge is not None and judge.rungs else None
            with teaching(cell, training.teacher, training.start, adapted, masks) as guide:
                trained = train(
                    adapted,
                    training.examples,
                    cell,
                    training.folder / "trainer",
                    training.tokenizer.pad_token_id,
                    progress=training.progress,
                    callbacks=[rungs] if rungs else [],
                    distillation=guide,
                )
        shutil.rmtree(training.folder / "trainer", ignore_errors=True)
        _log(result, trained, timed=rungs is None)
        if guide is not None:
            parts = guide.curves(cell.gradient_accumulation)
            result.series.update({f"train/{part}": points for part, points in parts.items()})
        if rungs is not None:
            result.series["eval/loss_while_training"] = rungs.losses
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
            merged = merge_all_lora_weights(adapted, cell.rounding, cell.seed)
        with clock("save"):
            save_model(merged, saved_tokenizer(training.base.folder), training.target)
        return Trained(merged, base_violations, exact=mode.masked_update, adapter=adapter)


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
        with training.clock("save"):
            save_model(training.model, saved_tokenizer(training.base.folder), training.target)
        return Trained(training.model, exact=True)


UNTRAINED = _Untrained()


def _log(result: CellResult, trained: TrainingResult, timed: bool) -> None:
    measured = {"train/loss": trained.loss, "memory/peak_bytes": trained.peak_bytes}
    if timed:  # nobody scored in between
        measured["train/tokens_per_second"] = trained.tokens_per_second
        measured["train/samples_per_second"] = trained.samples_per_second
    result.metrics.update({name: value for name, value in measured.items() if value is not None})
    result.series["train/loss_curve"] = trained.loss_curve
    result.protocol.update({f"train_{name}": value for name, value in trained.protocol.items()})
    result.protocol["train_untimed_steps"] = trained.warmup_steps_untimed

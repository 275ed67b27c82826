"""From a cell's flat parameters to the settings of training, adapters and scoring; all checked beforehand."""

from __future__ import annotations

from dataclasses import replace

from sparse_ft.errors import UserError
from sparse_ft.evaluation import EvaluationSettings
from sparse_ft.levels import levels_text
from sparse_ft.lora.config import LoraSettings
from sparse_ft.study.config import CellConfig
from sparse_ft.study.plan import mask_set_of
from sparse_ft.study.settings import pruning_settings
from sparse_ft.tracking.models import check_registered_name
from sparse_ft.training import TrainingSettings

__all__ = ["check_cell", "count", "evaluation_settings", "lora_settings", "training_settings"]


def check_cell(cell: CellConfig) -> None:
    """Refuses parameters under which the cell cannot run, before anything is loaded.

    Raises:
        UserError: naming the first such parameter.
    """
    if cell.pruned and not 0 <= cell.sparsity <= 1:
        raise UserError(f"sparsity is {cell.sparsity}; it must lie between 0 and 1 (50 % is 0.5).")
    for name in ("eval_limit", "eval_batch_size"):
        value = getattr(cell, name)
        if isinstance(value, int) and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")
    if cell.max_seq_len < 2:
        raise UserError(f"max_seq_len is {cell.max_seq_len}; it must be at least 2.")
    if cell.register_as not in ("none", "auto"):
        check_registered_name(cell.register_as)
    training_settings(cell).check()
    lora_settings(cell)
    evaluation_settings(cell).check()
    kind = mask_set_of(cell)
    if kind is not None:
        pruning_settings(replace(kind, sparsities=levels_text([cell.sparsity]))).check()


def training_settings(cell: CellConfig) -> TrainingSettings:
    """How the cell trains."""
    return TrainingSettings(
        learning_rate=cell.learning_rate,
        max_steps=cell.max_steps,
        batch_size=cell.batch_size,
        gradient_accumulation=cell.gradient_accumulation,
        warmup_fraction=cell.warmup_fraction,
        weight_decay=cell.weight_decay,
        gradient_checkpointing=cell.gradient_checkpointing,
        rounding=cell.rounding,
        seed=cell.seed,
    )


def lora_settings(cell: CellConfig) -> LoraSettings:
    """The cell's adapters.

    Raises:
        UserError: a rank, scaling or dropout that no adapter has.
    """
    targets = None if cell.target_modules == "all" else tuple(cell.target_modules.split(","))
    return LoraSettings(cell.lora_r, cell.lora_alpha, cell.lora_dropout, targets, cell.rounding)


def evaluation_settings(cell: CellConfig) -> EvaluationSettings:
    """How the cell's models are scored."""
    return EvaluationSettings(
        limit=count(cell.eval_limit),
        batch_size=cell.eval_batch_size,
        perplexity_seq_len=cell.perplexity_seq_len,
        perplexity_tokens=count(cell.perplexity_tokens),
        perplexity_corpus=cell.perplexity_corpus,
        share_contexts=cell.share_contexts,
        keep_samples=cell.keep_samples,
    )


def count(value: int | str) -> int | None:
    """A parameter that may be ``none``, as the parts take it."""
    return None if value == "none" else int(value)

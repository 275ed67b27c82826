"""From a cell's flat parameters to the settings of training, adapters and scoring; all checked beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sparse_ft.cell.pruning import pruning_settings
from sparse_ft.errors import UserError
from sparse_ft.evaluation import EvaluationSettings
from sparse_ft.levels import levels_text
from sparse_ft.lora.config import LoraSettings
from sparse_ft.settings.cell import CellConfig, mask_set_of
from sparse_ft.tracking.models import check_registered_name
from sparse_ft.training import TrainingSettings

__all__ = [
    "cell_problems",
    "check_cell",
    "count",
    "evaluation_settings",
    "lora_settings",
    "target_names",
    "training_settings",
]


def check_cell(cell: CellConfig) -> None:
    """Refuses parameters under which the cell cannot run, before anything is loaded.

    Raises:
        UserError: naming all such parameters, in one line.
    """
    if problems := cell_problems(cell):
        raise UserError(" ".join(problems))


def cell_problems(cell: CellConfig) -> list[str]:
    """All parameters under which the cell cannot run, one sentence each."""
    problems = []
    if cell.pruned and not 0 <= cell.sparsity <= 1:
        problems.append(f"sparsity is {cell.sparsity}; it must lie between 0 and 1 (50 % is 0.5).")
    for name, least in (("eval_limit", 1), ("eval_batch_size", 1), ("num_fewshot", 0), ("max_seq_len", 2)):
        value = getattr(cell, name)
        if isinstance(value, int) and value < least:
            problems.append(f"{name} is {value}; it must be at least {least}.")
    if not 0 <= cell.seed < 2**32:
        problems.append(f"seed is {cell.seed}; it must lie between 0 and {2**32 - 1}.")
    if not 0 <= cell.weight_decay < math.inf:
        problems.append(f"weight_decay is {cell.weight_decay}; it must be 0 or more.")
    corpus = cell.perplexity_corpus
    if cell.perplexity_tokens != 0 and corpus not in ("task", "wikitext2") and not Path(corpus).is_file():
        problems.append(f"perplexity_corpus is '{corpus}'; there is no such file. Give task, wikitext2 or a text file.")
    checks: list[Callable[[], object]] = [
        training_settings(cell).check,
        replace(evaluation_settings(cell), batch_size="auto", limit=None).check,
        lambda: target_names(cell.target_modules),
        lambda: lora_settings(replace(cell, target_modules="all")),
    ]
    if cell.register_as not in ("none", "auto"):
        checks.append(lambda: check_registered_name(cell.register_as))
    kind = mask_set_of(cell) if not cell.pruned or 0 <= cell.sparsity <= 1 else None
    if kind is not None:
        checks.append(lambda: pruning_settings(replace(kind, sparsities=levels_text([cell.sparsity]))).check())
    for check in checks:
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    return list(dict.fromkeys(problems))


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
    return LoraSettings(
        cell.lora_r, cell.lora_alpha, cell.lora_dropout, target_names(cell.target_modules), cell.rounding
    )


def target_names(text: str) -> tuple[str, ...] | None:
    """Projections as people list them, ``q_proj, v_proj``, sorted and each once; None for ``all``.

    Raises:
        UserError: an empty name.
    """
    names = sorted({name.strip() for name in text.split(",")})
    if "" in names:
        raise UserError(f"target_modules is '{text}'; list projections such as q_proj,v_proj, or write all.")
    return None if names == ["all"] else tuple(names)


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

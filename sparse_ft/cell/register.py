"""A cell's merged checkpoint into the model registry, with its card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sparse_ft.cell.inputs import EVALUATION, PERPLEXITY
from sparse_ft.cell.result import CellResult
from sparse_ft.levels import level_label
from sparse_ft.models.catalog import without_revision
from sparse_ft.progress import SILENT, Progress
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.corpora import TASK
from sparse_ft.settings.modes import MODES
from sparse_ft.settings.rules import rule_label
from sparse_ft.settings.training_data import hub_name
from sparse_ft.tracking.model_scores import link_scores
from sparse_ft.tracking.models import log_model, model_card, register_model, registered_name, sparsity_alias
from sparse_ft.tracking.parameters import flatten_config
from sparse_ft.tracking.record import Tag
from sparse_ft.tracking.runs import Tracker

__all__ = ["register_cell"]

_OTHER_STAGES = ("_untuned", "_recovered", "_adapter", "_remasked", "_while_training")
_WEIGHTS = (Tag.MASK_CHECKSUM, Tag.BASE_FINGERPRINT, Tag.HUB_COMMIT, Tag.MERGED_FINGERPRINT)  # what tells them apart


def register_cell(
    tracker: Tracker,
    run_id: str,
    cell: CellConfig,
    result: CellResult,
    progress: Progress = SILENT,
    said: Callable[[str], None] = print,
) -> str:
    """Logs the merged checkpoint as a model of the run and registers it under ``cell.register_as``.

    ``auto`` stands for ``MODEL-TASK-sparse``. A model that keeps its zeros gets the alias of its level, such
    as ``sparse70``; ``said`` is told where a model of another kind had it.

    Returns:
        the address to load it from: ``models:/NAME@sparse70``, or ``models:/NAME/VERSION`` without alias.
    """
    name = registered_name(cell.model, cell.task) if cell.register_as == "auto" else cell.register_as
    alias = sparsity_alias(cell.sparsity) if MODES[cell.mode].keeps_zeros else None
    card = _card(cell, result, f"models:/{name}@{alias}" if alias else None)
    tags = {
        "mode": cell.mode,
        "model": cell.model,
        **{key: cell.canonical()[key] for key in ("method", "scope", "sparsity")},
        "importance": _rule(cell),
        "accuracy": result.metrics.get("eval/accuracy"),
        "task": cell.task,
        **{tag: result.tags.get(tag) for tag in _WEIGHTS},
    }
    params = flatten_config(cell.canonical(), "")
    logged = log_model(tracker, run_id, result.merged, "model", card=card, tags=tags, params=params, progress=progress)
    link_scores(tracker, run_id, logged, {name: _measured_on(name) for name in result.metrics if _is_final(name)})
    version = register_model(tracker, logged, name, alias=alias, tags=tags, description=card, said=said)
    address = f"models:/{name}@{alias}" if alias else f"models:/{name}/{version}"
    tracker.log(run_id, tags={Tag.REGISTERED_AS: f"{name}/{version}"})
    return address


def _is_final(metric: str) -> bool:
    """Whether a metric is one of the merged model, and not of a stage before it, or of how it was made."""
    return metric.startswith(("eval/", "sparsity/")) and not metric.endswith(_OTHER_STAGES)


def _measured_on(metric: str) -> str | None:
    if not metric.startswith("eval/"):
        return None  # counted in the weights
    return PERPLEXITY if metric.startswith("eval/perplexity") else EVALUATION


def _rule(cell: CellConfig) -> str:
    """The importance, with what follows it."""
    values = cell.canonical()
    return rule_label(values["importance"], values)


def _rows(cell: CellConfig) -> str:
    """What it was trained on; of files their names alone, for a card may be published."""
    names = [cell.task if source == TASK else source for source in cell.sources]
    return " and ".join(name if hub_name(name) else Path(name).name for name in names)


def _card(cell: CellConfig, result: CellResult, address: str | None) -> str:
    metrics, protocol, values = result.metrics, result.protocol, cell.canonical()
    title = f"{cell.model} fine-tuned on {_rows(cell)}, {level_label(values['sparsity'])} % sparse ({cell.mode})"
    sparsity = {
        "asked": metrics.get("sparsity/target"),
        "of the masks": metrics.get("sparsity/achieved"),
        "after the merge": metrics.get("sparsity/after_merge"),
        "masked weights that are not zero": metrics.get("sparsity/violations"),
        "mask checksum": result.tags.get(Tag.MASK_CHECKSUM),
    }
    made = {key: values[key] for key in ("method", "importance", "scope", "mode", "lora_r", "lora_alpha")}
    made |= {"importance": _rule(cell)}
    made |= {key: values[key] for key in ("learning_rate", "max_steps", "batch_size", "seed")}
    made |= {"max_steps": protocol.get("train_max_steps", values["max_steps"])}  # with epochs only training knows
    scores = {key.removeprefix("eval/"): value for key, value in sorted(metrics.items()) if key.startswith("eval/")}
    scored = {key: value for key, value in sorted(protocol.items()) if not key.startswith("train_")}
    facts = {"Sparsity": sparsity, "How it was made": made, "Scores": scores, "Protocol of the scores": scored}
    return model_card(title, facts, base_model=without_revision(cell.model), load_uri=address)

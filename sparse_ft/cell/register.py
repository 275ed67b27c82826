"""A cell's merged checkpoint into the model registry, with its card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparse_ft.cell.inputs import EVALUATION, PERPLEXITY, SCORED_BESIDE
from sparse_ft.cell.result import CellResult
from sparse_ft.levels import level_label
from sparse_ft.models.catalog import without_revision
from sparse_ft.progress import SILENT, Progress
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.corpora import TASK
from sparse_ft.settings.field import defaults, plain_values
from sparse_ft.settings.modes import MODES
from sparse_ft.settings.recovery import RecoverySettings
from sparse_ft.settings.rules import rule_label
from sparse_ft.settings.training_data import hub_name
from sparse_ft.tracking.model_scores import link_scores
from sparse_ft.tracking.models import log_model, model_card, register_model, registered_name, sparsity_alias
from sparse_ft.tracking.parameters import flatten_config
from sparse_ft.tracking.record import Tag
from sparse_ft.tracking.runs import Tracker

__all__ = ["cell_card", "register_cell"]

_DESCRIPTION = 5000  # characters; what MLflow's databases take

_OTHER_STAGES = ("_untuned", "_recovered", "_adapter", "_remasked", "_while_training")
_WEIGHTS = (Tag.MASK_CHECKSUM, Tag.BASE_FINGERPRINT, Tag.HUB_COMMIT, Tag.MERGED_FINGERPRINT)  # what tells them apart


def register_cell(
    tracker: Tracker,
    run_id: str,
    cell: CellConfig,
    result: CellResult,
    progress: Progress = SILENT,
    said: Callable[[str], None] = print,
    move: bool = False,
) -> str:
    """Logs the merged checkpoint as a model of the run and registers it under ``cell.register_as``.

    ``auto`` stands for ``MODEL-TASK-sparse``. A model that keeps its zeros gets the alias of its level, such
    as ``sparse70``; ``said`` is told where a model of another kind had it. With ``move`` its files go into the store
    one by one instead of being copied, where the run's adapter can make the model again if the store fails meanwhile.

    Returns:
        the address to load it from: ``models:/NAME@sparse70``, or ``models:/NAME/VERSION`` without alias.
    """
    name = registered_name(cell.model, cell.task) if cell.register_as == "auto" else cell.register_as
    alias = sparsity_alias(cell.sparsity) if MODES[cell.mode].keeps_zeros else None
    card = cell_card(cell, result, f"models:/{name}@{alias}" if alias else None)
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
    move = move and MODES[cell.mode].lora and Tag.RECOVERED_FINGERPRINT not in result.tags
    logged = log_model(
        tracker, run_id, result.merged, "model", card=card, tags=tags, params=params, progress=progress, move=move
    )
    link_scores(tracker, run_id, logged, {name: _measured_on(name) for name in result.metrics if _is_final(name)})
    version = register_model(tracker, logged, name, alias=alias, tags=tags, description=_cut(card), said=said)
    address = f"models:/{name}@{alias}" if alias else f"models:/{name}/{version}"
    tracker.log(run_id, tags={Tag.REGISTERED_AS: f"{name}/{version}"})
    return address


def _is_final(metric: str) -> bool:
    """Whether a metric is one of the merged model, and not of a stage before it, or of how it was made."""
    return metric.startswith(("eval/", "sparsity/")) and not metric.endswith(_OTHER_STAGES)


def _measured_on(metric: str) -> tuple[str, ...]:
    kind, *task, _ = metric.split("/")
    if kind != "eval" or metric.startswith("eval/mean_"):
        return ()  # counted in the weights; or of several tasks
    if task:
        return SCORED_BESIDE, "/".join(task)
    return (PERPLEXITY if metric.startswith("eval/perplexity") else EVALUATION,)


def _cut(card: str) -> str:
    """As much of a card as a registry's column holds, whole lines; the model has all of it."""
    if len(card) <= _DESCRIPTION:
        return card
    return card[: card.rindex("\n", 0, _DESCRIPTION - 2)] + "\n…"


def _rule(cell: CellConfig) -> str:
    """The importance, with what follows it."""
    values = cell.canonical()
    return rule_label(values["importance"], values)


def _rows(cell: CellConfig) -> str:
    """What it was trained on; of files their names alone, for a card may be published."""
    names = [cell.task if source == TASK else source for source in cell.sources]
    return " and ".join(name if hub_name(name) else Path(name).name for name in names)


def cell_card(cell: CellConfig, result: CellResult, address: str | None = None, hub: str | None = None) -> str:
    """The card of a cell's merged model: its sparsity, data, recovery and teacher, and its scores with their protocol.

    Args:
        cell: what was asked for.
        result: what was measured.
        address: in the model registry, for the example of loading it.
        hub: likewise, on the hub.
    """
    metrics, values = result.metrics, cell.canonical()
    protocol = flatten_config({name: value for name, value in result.protocol.items() if value is not None}, "")
    # Of folders their names alone, for a card may be published.
    protocol |= {name: Path(value).name for name, value in protocol.items()
                 if name.startswith(("source", "score_source")) and not value.startswith("hub:")}  # fmt: skip
    trained = f"fine-tuned on {_rows(cell)}" if MODES[cell.mode].trains else "pruned"
    title = f"{cell.model} {trained}, {level_label(values['sparsity'])} % sparse ({cell.mode})"
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
    facts: dict[str, Any] = {
        "Sparsity": sparsity,
        "How it was made": made,
        "Data": _data(cell, protocol),
        "Recovery": _recovery(cell),
        "Teacher": _teacher(cell),
        "Scores": scores,
        "Protocol of the scores": scored,
    }
    source = str(protocol.get("source", ""))
    return model_card(
        title,
        facts,
        base_model=without_revision(cell.model),
        load_uri=address,
        hub=hub,
        datasets=[source.removeprefix("hub:")]
        if source.startswith("hub:") and MODES[cell.mode].trains and TASK in cell.sources
        else (),
    )


def _data(cell: CellConfig, protocol: Mapping[str, str]) -> Mapping[str, Any] | str:
    """What it was trained on, and what its masks were calibrated on."""
    said = {}
    if MODES[cell.mode].trains:
        said = {"trained on": _rows(cell)}
        if TASK in cell.sources:
            said |= {"split": protocol.get("training_split"), "rows from": protocol.get("source")}
        said |= {
            name.removeprefix("train_"): value for name, value in sorted(protocol.items()) if name.startswith("train_")
        }
    if cell.pruned and cell.masks is None and cell.needs_calibration:
        text = cell.task if cell.calibration_corpus == TASK else cell.calibration_corpus
        said["masks calibrated on"] = f"{cell.calibration_samples} x {cell.calibration_seq_len} tokens of {text}"
    return said or "It was trained on nothing: its weights are the base model's, but for those that were pruned."


def _recovery(cell: CellConfig) -> Mapping[str, Any] | str:
    if not cell.recovered:
        return "None: it was not trained on running text after pruning."
    return _settings(cell, "recover_")


def _teacher(cell: CellConfig) -> Mapping[str, Any] | str:
    return _settings(cell, "teacher") if cell.has_teacher else "None."


def _settings(cell: CellConfig, prefix: str) -> dict[str, Any]:
    """The fields of recovery whose names begin so, without that."""
    values = plain_values(cell)
    names = (name for name in defaults(RecoverySettings) if name in values and name.startswith(prefix))
    return {name.removeprefix(f"{prefix.rstrip('_')}_"): values[name] for name in names}

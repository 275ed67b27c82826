"""What perplexity is measured on in a study that does not say so: decided once, for all of its cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sparse_ft.cell.perplexity import usual_perplexity
from sparse_ft.errors import UserError
from sparse_ft.files import load_yaml
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.settings.field import plain_values
from sparse_ft.settings.scoring import TASK_TEXT, ScoringSettings
from sparse_ft.study.plan import Plan
from sparse_ft.study.start import STUDY_FILE
from sparse_ft.study.study_file import Study
from sparse_ft.tracking.record import Kind, Tag
from sparse_ft.tracking.runs import Tracker

__all__ = ["with_perplexity"]


def with_perplexity(study: Study, config: SweepConfig, plan: Callable[[Study], Plan]) -> Study:
    """The study, saying how perplexity is measured; one that is resumed goes on as it began.

    Args:
        study: as its file says it.
        config: how it is run.
        plan: makes its plan.
    """
    said = {
        *study.cell,
        *(axis for table in study.tables for axis in table),
        *((study.search or {}).get("space") or {}),
    }
    if said & set(TASK_TEXT):
        return study
    usual = _saying(study, TASK_TEXT)
    planned = plan(usual)
    before = _begun(config, planned.key)
    return _saying(study, usual_perplexity(planned.configs) if before is None else before)


def _saying(study: Study, values: dict[str, Any]) -> Study:
    words = plain_values(replace(ScoringSettings(), **values))
    return replace(study, cell={**study.cell, **{name: words[name] for name in values}}, left_open=frozenset(values))


def _begun(config: SweepConfig, key: str) -> dict[str, Any] | None:
    """What the study that is about to be resumed began with; None where none is."""
    if config.resume == "new" or (tracker := Tracker.of_existing()) is None:
        return None
    run_id = config.resume
    if run_id is None:
        runs = tracker.search(f"tags.{Tag.KIND} = '{Kind.STUDY}' and tags.{Tag.PLAN_KEY} = '{key}'")
        if not runs or runs[-1].tags.get(Tag.COMPLETE) == "true":
            return None
        run_id = runs[-1].run_id
    try:
        cell = load_yaml(tracker.fetch_text(run_id, STUDY_FILE)).get("cell") or {}
    except UserError:  # no such run, or it was killed before it said so
        return None
    told = {name: cell.get(name, value) for name, value in TASK_TEXT.items()}  # older versions said nothing
    return {name: None if value in ("none", None) else value for name, value in told.items()}

"""What the rows of a task are, as opposed to what they are called: digests of its splits."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task
from lm_eval.tasks._yaml_loader import load_yaml

from sparse_ft.tasks.definitions import definition_of, eval_split
from sparse_ft.tasks.finding import LM_EVAL_TASKS, quiet

__all__ = ["data_digests", "definition_digest", "scored_digests"]

_ROWS = 1000  # read at a time


def data_digests(task: Task) -> dict[str, str]:
    """16 hex digits for the rows of each role a split of the task has: ``training_data``, ``scored_data``, and
    ``fewshot_data`` where examples stand before the questions. A role without a split is left out. A task that is none
    of lm-eval's has a ``task_definition`` too: of its YAML, and of the Python files beside it.

    SHA-256 over every row of the split in its order, as lm-eval reads them, whatever file or hub they came from.
    """
    return _digests(task, {"training_data": task.config.training_split})


@lru_cache(maxsize=256)
def scored_digests(task: Task) -> dict[str, str]:
    """As `data_digests`, of what a score on the task depends on: not of what it could be trained on."""
    return _digests(task, {})


def _digests(task: Task, splits: dict[str, Any]) -> dict[str, str]:
    splits |= {"scored_data": eval_split(task)}
    if task.config.num_fewshot:
        splits["fewshot_data"] = task.config.fewshot_split or task.config.training_split or splits["scored_data"]
    known = {split: _digest(task.dataset[split]) for split in set(splits.values()) if split in task.dataset}
    found = {role: known[split] for role, split in splits.items() if split in known}
    path = definition_of(task)
    return found if path.is_relative_to(LM_EVAL_TASKS) else found | {"task_definition": definition_digest(path)}


def definition_digest(path: Path) -> str:
    """16 hex digits of a YAML file as lm-eval reads it, with the Python files beside it."""
    told = hashlib.sha256(json.dumps(load_yaml(path, resolve_func=False), sort_keys=True, default=str).encode())
    for file in sorted(path.parent.glob("*.py")):
        told.update(file.name.encode() + b"\n" + hashlib.sha256(file.read_bytes()).digest())
    return told.hexdigest()[:16]


def _digest(rows) -> str:
    identity = hashlib.sha256()
    with quiet():
        for batch in rows.iter(_ROWS):
            columns = sorted(batch)
            for row in zip(*(batch[name] for name in columns), strict=True):
                pairs = dict(zip(columns, row, strict=True))
                identity.update(json.dumps(pairs, sort_keys=True, default=str).encode() + b"\n")
    return identity.hexdigest()[:16]

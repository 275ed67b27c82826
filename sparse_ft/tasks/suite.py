"""What is scored beside the task that was trained: tasks and groups of lm-eval by name, with their rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind

from sparse_ft.errors import UserError
from sparse_ft.progress import SILENT, Progress
from sparse_ft.settings.scoring import with_shots
from sparse_ft.tasks.definitions import load_definition
from sparse_ft.tasks.digests import definition_digest, scored_digests
from sparse_ft.tasks.finding import LM_EVAL_TASKS, find_task, quiet, task_index
from sparse_ft.tasks.packaged import PACKAGED, PACKAGED_TASKS

__all__ = ["ScoredTask", "load_suite", "suite_digest"]


@dataclass(frozen=True)
class ScoredTask:
    """A task, or a group that lm-eval gives numbers of its own.

    Attributes:
        name: of the task or the group.
        tasks: the task, or all that are in the group, by name.
        groups: the group, and those inside it, by name; empty for a task.
        files: the YAML of the groups that are none of lm-eval's.
    """

    name: str
    tasks: Mapping[str, Task]
    groups: Mapping[str, Group] = field(default_factory=dict)
    files: tuple[Path, ...] = ()


def load_suite(
    words: Sequence[str],
    data_dir: str | Path | None = None,
    include_path: str | Path | None = None,
    progress: Progress = SILENT,
) -> tuple[ScoredTask, ...]:
    """The tasks and groups of a list, as lm-eval's own command line would load them.

    A tag stands for its tasks, and a group without numbers of its own for its members.

    Args:
        words: see `sparse_ft.settings.scoring.read_scored`.
        data_dir: rows of a task are read from ``data_dir/TASK/SPLIT.jsonl`` where that folder is there, else from the
            hub; of a group each task has a folder.
        include_path: a folder whose YAML files come before lm-eval's own.
        progress: told about downloads.

    Raises:
        UserError: names that are unknown or named twice, rows that cannot be had; all of them at once.
    """
    found: dict[str, ScoredTask] = {}
    problems: dict[str, None] = {}
    for word in words:
        name, shots = with_shots(word)
        try:
            with quiet():
                for item in _items(name, _Factory(data_dir, shots, progress), include_path):
                    if item.name in found:
                        raise UserError(f"score has {item.name} twice (score: {', '.join(words)}); leave one out")
                    found[item.name] = item
        except UserError as error:
            problems[str(error)] = None
    if problems:
        raise UserError(" | ".join(problems))
    return tuple(found.values())


def suite_digest(suite: Sequence[ScoredTask]) -> str:
    """16 hex digits of all rows that are scored or stand before questions, and of definitions that are none of
    lm-eval's."""
    told: list[Any] = []
    for item in suite:
        told.append([item.name, [definition_digest(file) for file in item.files]])
        told += [[name, scored_digests(task)] for name, task in item.tasks.items()]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _items(name: str, factory: _Factory, include_path: str | Path | None) -> Iterator[ScoredTask]:
    path = find_task(name, include_path)  # a single task is found without reading all of lm-eval's files
    if path is not None:
        task = factory._build_task(Entry(name, Kind.TASK, path), None)
        yield ScoredTask(name, {name: task})
        return
    registry = _registry(name, include_path)
    try:
        built = factory.build(registry[name], overrides=None, registry=dict(registry))
    except UserError:
        raise
    except Exception as error:  # a member that is not there, a definition that is none
        raise UserError(f"the group {name} cannot be made ({type(error).__name__}: {error})".splitlines()[0]) from error
    own = {n: entry.yaml_path for n, entry in registry.items() if entry.kind is Kind.GROUP and entry.yaml_path}
    for part in built if isinstance(built, list) else [built]:
        yield from _flat(part, own)


def _flat(part: Task | Group, files: Mapping[str, Path]) -> Iterator[ScoredTask]:
    if isinstance(part, Task):
        yield ScoredTask(part.config.task, {part.config.task: part})
    elif part.has_aggregation:
        groups = {group.name: group for group in (part, *part.get_all_groups())}
        paths = [files[name] for name in groups if name in files]
        yield ScoredTask(
            part.name,
            {task.config.task: task for task in part.get_all_tasks()},
            groups,
            tuple(path for path in paths if not path.is_relative_to(LM_EVAL_TASKS)),
        )
    else:
        for member in part:
            yield from _flat(member, files)


def _registry(name: str, include_path: str | Path | None) -> dict[str, Entry]:
    """Everything that has a name, as lm-eval finds it; where one's own folder has all of a group, that alone: to read
    lm-eval's thousands of files takes ten seconds."""
    own = {} if include_path is None else task_index(Path(include_path))
    return own if _is_whole(name, own) else task_index(LM_EVAL_TASKS) | own


def _is_whole(name: str, registry: Mapping[str, Entry]) -> bool:
    """Whether a name stands for what is all in the registry."""
    entry = registry.get(name)
    if entry is None or entry.kind is not Kind.GROUP:
        return entry is not None
    members = [m if isinstance(m, str) else m.get("task") or m.get("group") for m in entry.cfg.get("task") or []]
    return all(isinstance(member, str) and _is_whole(member, registry) for member in members)


class _Factory(TaskFactory):
    """lm-eval's way from definitions to tasks and groups, with rows from where ours come from."""

    def __init__(self, data_dir: str | Path | None, shots: int | None, progress: Progress):
        super().__init__()
        self._data_dir, self._shots, self._progress = data_dir, shots, progress

    def _build_task(self, entry: Entry, overrides: Mapping[str, Any] | None) -> Task:
        changes = dict(overrides or {})
        name = changes.get("task", entry.name)
        return load_definition(name, entry.yaml_path, self._place(name), self._shots, self._progress, changes)

    def _place(self, name: str) -> str | Path | None:
        if self._data_dir is None:
            return None
        if str(self._data_dir) == PACKAGED:
            return PACKAGED if name in PACKAGED_TASKS else None
        return self._data_dir if (Path(self._data_dir).expanduser() / name).is_dir() else None

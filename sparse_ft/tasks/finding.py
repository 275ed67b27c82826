"""Where lm-eval's definition of a task is, among its own thousands or in a folder of the user's."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path

import datasets
import lm_eval.tasks
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry

from sparse_ft.errors import UserError

__all__ = ["LM_EVAL_TASKS", "find_task", "quiet", "task_file", "task_index"]

LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent
# Where lm-eval keeps the tasks that are used all the time, so that nothing need be searched for them.
_FOLDERS = {"boolq": "super_glue/boolq", "hellaswag": "hellaswag", "gsm8k": "gsm8k"}


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the warnings of lm-eval and the bars of ``datasets`` off the terminal; errors still show."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def task_file(name: str, include_path: str | Path | None = None) -> Path:
    """The YAML file of the task, in ``include_path`` or in lm-eval.

    Raises:
        UserError: there is nothing of that name, or a group.
    """
    entry = _found(name, include_path)
    if not entry.kind.name.endswith("TASK") or entry.yaml_path is None:
        raise UserError(f"{name!r} is a {entry.kind.name.lower()} of lm-eval tasks; name one of its tasks")
    return entry.yaml_path


def find_task(name: str, include_path: str | Path | None = None) -> Path | None:
    """The YAML file of the task, in ``include_path`` or in lm-eval; None where the name stands for several tasks.

    Raises:
        UserError: there is nothing of that name.
    """
    entry = _found(name, include_path)
    return entry.yaml_path if entry.kind.name.endswith("TASK") else None


def _found(name: str, include_path: str | Path | None) -> Entry:
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"include_path {include_path} is not a folder; it should hold the YAML file of a task")
    entry = None if include_path is None else _entry(name, Path(include_path))
    if entry is None:
        entry = _entry(name, LM_EVAL_TASKS / _FOLDERS[name] if name in _FOLDERS else _folder(name, LM_EVAL_TASKS))
    if entry is None:
        where = "" if include_path is None else f", nor has {include_path}"
        raise UserError(f"lm-eval {version('lm_eval')} has no task {name!r}{where}; see 'lm_eval ls tasks'")
    return entry


def _entry(name: str, folder: Path) -> Entry | None:
    """What lm-eval found under the name in the YAML files of a folder; None: nothing."""
    return task_index(folder).get(name)


def task_index(folder: Path) -> dict[str, Entry]:
    """What lm-eval finds in the YAML files of a folder, by name; its own are read once."""
    folder = folder.absolute()
    return _own_index(folder) if folder.is_relative_to(LM_EVAL_TASKS) else _index(folder)


@cache
def _own_index(folder: Path) -> dict[str, Entry]:
    return _index(folder)


def _index(folder: Path) -> dict[str, Entry]:
    with quiet():
        return TaskManager(include_path=folder, include_defaults=False).task_index


def _folder(name: str, root: Path) -> Path:
    """The folder whose files name the task; ``root`` if none does.

    lm-eval finds a name by parsing its thousands of files, which takes ten seconds; to look for the lines
    takes one, and is done once.
    """
    return _named(root).get(name, root)


@cache
def _named(root: Path) -> dict[str, Path]:
    """The folder of every name that stands in a line of its own."""
    line = re.compile(r"""^["']?(?:task|group)["']?: *["']?([^"'#\n]+?)["']? *$""", re.MULTILINE)
    found: dict[str, Path] = {}
    for path in sorted(root.rglob("*.yaml")):
        for name in line.findall(path.read_text(encoding="utf-8")):
            found.setdefault(name, path.parent)
    return found

"""lm-eval's own task definitions over rows of our choosing: same prompts, metrics, filters and versions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import yaml
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from sparse_ft.errors import UserError
from sparse_ft.files import write_text
from sparse_ft.progress import SILENT, Progress
from sparse_ft.tasks.finding import quiet, task_file
from sparse_ft.tasks.packaged import PACKAGED, PACKAGED_TASKS, packaged_data_dir
from sparse_ft.tasks.sources import ADAPTED, adapt_row, line_number, local_rows, write_rows

__all__ = [
    "definition_of",
    "eval_split",
    "gold_index",
    "has_training_split",
    "load_definition",
    "load_task",
    "local_source",
    "set_fewshot",
    "task_protocol",
    "write_lm_eval_task",
]


def load_task(
    name: str,
    data_dir: str | Path | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    progress: Progress = SILENT,
) -> Task:
    """The lm-eval task ``name``, with rows from ``data_dir``.

    Only the source of the rows is replaced; everything else is the YAML file that lm-eval ships.

    Args:
        name: a task of lm-eval (``boolq``, ``hellaswag``, ``gsm8k``, ``arc_easy``, ...).
        data_dir: a folder with ``NAME/SPLIT.jsonl`` in the hub's columns; ``packaged`` for the BoolQ or PIQA that
            this project fetches by itself; None for the hub, through ``datasets``. In a folder the scored
            split must be there; the training split may be missing if no few-shot example needs it.
        num_fewshot: examples before each question; None for the task's own default (GSM8K 5, the rest 0).
        include_path: a folder whose YAML files define tasks that come before lm-eval's own; None for those alone.
        progress: told about a download.

    Returns:
        A task whose evaluation split is test where the definition has one, else validation.

    Raises:
        UserError: the name is unknown or stands for several tasks, rows are missing or malformed, or the
            hub cannot be reached.
    """
    return load_definition(name, task_file(name, include_path), data_dir, num_fewshot, progress)


def load_definition(
    name: str,
    path: Path,
    data_dir: str | Path | None = None,
    num_fewshot: int | None = None,
    progress: Progress = SILENT,
    changes: Mapping[str, Any] | None = None,
) -> Task:
    """As `load_task`, from the YAML file ``path``; ``changes`` are what a group says of it."""
    with quiet():
        if data_dir is None:
            task = _from_hub(name, path, changes)
            _check_hub_rows(task, name)
            source = f"hub:{task.config.dataset_path}"
        else:
            packaged = str(data_dir) == PACKAGED
            folder = packaged_data_dir(name, progress) if packaged else Path(data_dir)
            task = _from_folder(name, path, folder, num_fewshot, changes)
            source = PACKAGED if packaged else str(data_dir)
    # lm-eval's own rule (simple_evaluate): what is asked, else the definition's default, else none.
    set_fewshot(task, num_fewshot if num_fewshot is not None else task.config.num_fewshot or 0)
    task.set_config("metadata", {**(task.config.metadata or {}), "source": source, "definition": str(path)})
    return task


def set_fewshot(task: Task, num_fewshot: int) -> None:
    """Sets how many examples stand before each question.

    Raises:
        UserError: negative, or more than there are rows to take them from.
    """
    available = len(task.sampler.df) if hasattr(task, "sampler") else 0
    # Of examples out of the very rows that are scored, the question itself is none.
    most = max(0, available - (_fewshot_split(task) == eval_split(task)))
    if num_fewshot < 0 or num_fewshot > most:
        raise UserError(
            f"num_fewshot is {num_fewshot}; {task.config.task} has {available} rows to take examples from, so "
            f"it must be between 0 and {most}"
        )
    task.set_config("num_fewshot", num_fewshot)


def _fewshot_split(task: Task) -> str | None:
    """The split that examples come from; None where the definition has them itself."""
    if (own := getattr(task, "fewshot_cfg", None)) is not None and own.split is None and own.samples is not None:
        return None
    named = (getattr(task.config, f"{kind}_split", None) for kind in ("fewshot", "training", "validation", "test"))
    return next(filter(None, named), None)


def eval_split(task: Task) -> str:
    """The name of the split that is scored: test where the definition has one, else validation."""
    return task.config.test_split if task.has_test_docs() else task.config.validation_split


def definition_of(task: Task) -> Path:
    """The YAML file that a task of `load_task` was made from."""
    return Path(task.config.metadata["definition"])


def has_training_split(task: Task) -> bool:
    """Whether the definition of the task has a training split at all."""
    return bool(load_yaml(definition_of(task), resolve_func=False).get("training_split"))


def local_source(task: Task) -> str | None:
    """The folder that the task's rows came from; None: the hub, or a package."""
    source = (task.config.metadata or {}).get("source", "")
    return None if source == PACKAGED or source.startswith("hub:") else source or None


def task_protocol(task: Task) -> dict[str, Any]:
    """What a score on ``task`` depends on besides the model: name, version, few-shot, splits, source."""
    return {
        "task": task.config.task,
        "task_version": task.VERSION,
        "num_fewshot": task.config.num_fewshot or 0,
        "split": eval_split(task),
        "split_rows": len(task.eval_docs),
        "training_split": task.config.training_split,
        "output_type": task.OUTPUT_TYPE,
        "source": (task.config.metadata or {}).get("source", ""),
        "lm_eval_version": version("lm_eval"),
    }


def write_lm_eval_task(name: str, data_dir: str | Path, folder: str | Path) -> Path:
    """Writes rows and a task file with which lm-eval's own command line scores on the same rows.

    ``lm_eval run --model hf --model_args pretrained=CHECKPOINT --tasks NAME --include_path FOLDER`` then
    gives the numbers of :func:`sparse_ft.evaluation.evaluate`, without any code of this project.

    Returns:
        The path of the YAML file in ``folder``.

    Raises:
        UserError: as :func:`load_task`.
    """
    path = task_file(name)
    config = load_yaml(path, resolve_func=False)
    source = packaged_data_dir(name) if str(data_dir) == PACKAGED else Path(data_dir)
    files = {}
    for split, rows in _folder_splits(name, config, source, None).items():
        files[split] = str((Path(folder) / name / f"{split}.jsonl").resolve())
        write_rows(files[split], rows)
    override: dict[str, Any] = {"include": str(path), "task": name, "dataset_path": "json"}
    override.update(dataset_name=None, dataset_kwargs={"data_files": files})
    override.update(_without_missing(config, set(files)))
    target = Path(folder) / f"{name}.yaml"
    write_text(target, yaml.safe_dump(override, sort_keys=False))
    return target


def _from_hub(name: str, path: Path, changes: Mapping[str, Any] | None) -> Task:
    try:
        return TaskFactory()._build_task(Entry(name, Kind.TASK, path), dict(changes or {}))
    except UserError:
        raise
    except Exception as error:  # datasets raises half a dozen classes for "no network"
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        ours = f", or '{PACKAGED}'" if name in PACKAGED_TASKS else ""
        raise UserError(
            f"cannot load the data of {name} from the hub ({reason}); check the network, or give data_dir: "
            f"a folder with {name}/SPLIT.jsonl{ours}"
        ) from error


def _from_folder(
    name: str, path: Path, folder: Path, num_fewshot: int | None, changes: Mapping[str, Any] | None
) -> Task:
    config = {**load_yaml(path, resolve_func=True), **(changes or {})}
    if "class" in config:
        raise UserError(f"{name} is written in Python and takes data from the hub only; leave data_dir out")
    splits = _folder_splits(name, config, folder, num_fewshot)
    rows = {split: _dataset(rows, folder / name / f"{split}.jsonl") for split, rows in splits.items()}
    try:
        task = ConfigurableTask(
            config={
                **{key: value for key, value in config.items() if key not in ("tag", "group", "task_list")},
                **_without_missing(config, set(splits)),
                # A callable instead of dataset_path: the rows stay in memory, and neither the hub nor the
                # cache of datasets is touched.
                "custom_dataset": _returning(datasets.DatasetDict(rows)),
                "dataset_kwargs": None,
                "process_docs": _once_per_split(config.get("process_docs")),
            }
        )
    except UserError:
        raise
    except Exception as error:  # lm-eval tries the first row, by templates and functions that raise anything
        first = folder / name / f"{_scored(config)}.jsonl"
        raise UserError(f"{first}:{line_number(first, 0)} does not fit {name} ({_reason(error)})") from error
    if name not in ADAPTED:  # whose answers were looked at as they were read

        def place(split: str, index: int | None) -> str:
            path = folder / name / f"{split}.jsonl"
            return f"{path}, a row" if index is None else f"{path}:{line_number(path, index)}"

        _check_answers(task, {task.config.training_split, task.config.validation_split, task.config.test_split}, place)
    return task


def _scored(config: Mapping[str, Any]) -> str | None:
    """The split that a definition scores."""
    return config.get("test_split") or config.get("validation_split")


def _dataset(rows: list[dict[str, Any]], path: Path) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_list(rows)
    except Exception as error:  # what pyarrow cannot hold in one column
        raise UserError(f"{path} has a column of mixed values ({_reason(error)})") from error


def _check_hub_rows(task: Task, name: str) -> None:
    """The same look at what the hub gave: rows to train on, and rows to score (other splits may hide their answers)."""

    def place(split: str, index: int | None) -> str:
        return f"{task.config.dataset_path} on the hub: {split}, " + ("a row" if index is None else f"row {index}")

    splits = {task.config.training_split, eval_split(task)}
    if name not in ADAPTED:
        _check_answers(task, splits, place)
        return
    for split in sorted(splits - {None}):
        for index, row in enumerate(task.dataset[split]):
            adapt_row(name, row, place(split, index))


def _check_answers(task: Task, splits: set[str | None], place: Callable[[str, int | None], str]) -> None:
    """Raises UserError for a row whose question or answer cannot be made, or whose answer is none of its choices.

    Args:
        task: with its rows.
        splits: those to look at; None among them is none.
        place: a split and a row's number (from 0; None where it cannot be told) -> where that is.
    """
    for split in sorted(splits - {None}):
        rows = task.dataset[split]
        docs = task.config.process_docs(rows) if task.config.process_docs else rows
        for index, doc in enumerate(docs):
            try:
                task.doc_to_text(doc)
                if task.OUTPUT_TYPE == "multiple_choice":
                    gold_index(task, doc)
                else:
                    task.doc_to_target(doc)
            except Exception as error:  # UserError, or whatever a template or function raises
                # Rows that a task's own filter leaves out shift the others; then the row cannot be named.
                where = place(split, index if len(docs) == len(rows) else None)
                reason = str(error) if isinstance(error, UserError) else f"no prompt and answer ({_reason(error)})"
                raise UserError(f"{where}: {reason}") from error


def gold_index(task: Task, doc: Any) -> int:
    """Which of a multiple-choice question's choices is right.

    Raises:
        UserError: the row's answer names none of its choices.
    """
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else _one(task.doc_to_target(doc))
    index = choices.index(gold) if gold in choices else gold
    if not isinstance(index, int) or not 0 <= index < len(choices):
        raise UserError(f"{task.config.task}: answer {gold!r} is none of the choices {choices}")
    return index


def _one(target: Any) -> Any:
    """The first of several right answers, which is what lm-eval's few-shot examples show."""
    return target[0] if isinstance(target, list) else target


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _once_per_split(process: Callable[[datasets.Dataset], datasets.Dataset] | None) -> Callable | None:
    """``process`` with its results kept: lm-eval maps a whole split again each time it looks at it."""
    if process is None:
        return None
    done: dict[int, tuple[datasets.Dataset, datasets.Dataset]] = {}

    def process_docs(rows: datasets.Dataset) -> datasets.Dataset:
        if id(rows) not in done:
            done[id(rows)] = (rows, process(rows))  # the rows are held too, so that their id stays theirs
        return done[id(rows)][1]

    return process_docs


def _returning(rows: datasets.DatasetDict) -> Callable[..., datasets.DatasetDict]:
    def custom_dataset(**_: Any) -> datasets.DatasetDict:
        return rows

    return custom_dataset


def _folder_splits(
    name: str, config: dict[str, Any], folder: Path, num_fewshot: int | None
) -> dict[str, list[dict[str, Any]]]:
    """Rows of each split that the definition names and the folder holds."""
    scored = _scored(config)
    fewshot = config.get("fewshot_split") or config.get("training_split") or scored
    names = [config.get(f"{kind}_split") for kind in ("training", "validation", "test", "fewshot")]
    splits = {}
    for split in dict.fromkeys(split for split in names if split):
        rows = local_rows(name, split, folder)
        if rows is not None:
            splits[split] = rows
    shots = config.get("num_fewshot") if num_fewshot is None else num_fewshot
    needed = [(scored, "is scored")] + ([(fewshot, f"gives the {shots} few-shot examples")] if shots else [])
    for split, why in needed:
        if split not in splits:
            raise UserError(f"{folder / name / f'{split}.jsonl'} is missing: of {name}, {split} {why}")
    return splits


def _without_missing(config: dict[str, Any], present: set[str]) -> dict[str, None]:
    """Overrides that take out the splits which the folder does not hold."""
    keys = [f"{kind}_split" for kind in ("training", "validation", "test", "fewshot")]
    return {key: None for key in keys if config.get(key) and config[key] not in present}

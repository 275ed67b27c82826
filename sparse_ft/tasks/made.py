"""Small task files made on the spot, for smoke runs and tests: real columns, made-up content."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparse_ft.cache import cache_dir
from sparse_ft.tasks.sources import write_rows

__all__ = ["MADE", "made_data_dir"]

MADE = "made"
"""The ``data_dir`` that stands for these files."""

_VERSION = 1  # part of the folder's name: content changes, folder changes
_TRAIN, _HELD_OUT = 240, 60
_THINGS = ("apples", "stones", "books", "coins", "ships", "lamps", "birds", "letters")
_PEOPLE = ("Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Hugo")
_ACTS = ("opens the box", "ties the rope", "lights the lamp", "folds the paper", "turns the wheel", "sails away")


def made_data_dir() -> Path:
    """The folder with ``boolq``, ``hellaswag`` and ``gsm8k`` in the hub's columns, made once into the cache.

    300 rows a task, simple sentences about counting, the same bytes on every machine. Scores on them say
    that the machinery works, nothing about language.
    """
    folder = cache_dir() / f"made-tasks-{_VERSION}"
    kinds: dict[str, tuple[Callable[[random.Random], dict[str, Any]], str]] = {
        "boolq": (_boolq, "validation"),
        "hellaswag": (_hellaswag, "validation"),
        "gsm8k": (_gsm8k, "test"),
    }
    for task, (make, held_out) in kinds.items():
        splits = {"train": _TRAIN, held_out: _HELD_OUT}
        for split, count in splits.items():
            path = folder / task / f"{split}.jsonl"
            if not path.is_file():
                chance = random.Random(f"{task}/{split}")
                write_rows(path, [make(chance) for _ in range(count)])
    return folder


def _boolq(chance: random.Random) -> dict[str, Any]:
    who, other = chance.sample(_PEOPLE, 2)
    what, first, second = chance.choice(_THINGS), chance.randint(1, 9), chance.randint(1, 9)
    asked = chance.choice([first, second])
    passage = f"{who} has {first} {what}. {other} has {second} {what}. They sit at a table and count them."
    return {"question": f"does {who} have {asked} {what}", "passage": passage, "answer": asked == first}


def _hellaswag(chance: random.Random) -> dict[str, Any]:
    who, what, count = chance.choice(_PEOPLE), chance.choice(_THINGS), chance.randint(1, 5)
    acts = chance.sample(_ACTS, 4)
    label = chance.randrange(4)
    text = f"{who} takes {count} {what} and {acts[label]}. Then {who}"
    return {
        "activity_label": "Counting",
        "ctx": text,
        "endings": [f"{act} again." for act in acts],
        "label": f"{label}",
    }


def _gsm8k(chance: random.Random) -> dict[str, Any]:
    who, what = chance.choice(_PEOPLE), chance.choice(_THINGS)
    first, second = chance.randint(1, 20), chance.randint(1, 20)
    question = f"{who} has {first} {what} and finds {second} more. How many {what} does {who} have now?"
    answer = f"{who} has {first} + {second} = <<{first}+{second}={first + second}>>{first + second} {what}."
    return {"question": question, "answer": f"{answer}\n#### {first + second}"}

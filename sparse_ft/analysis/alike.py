"""Were two points fine-tuned and scored in the same way? Only then may one be divided by the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from sparse_ft.analysis.table import EVALUATION_PROTOCOL, GROUP
from sparse_ft.settings.field import defaults, named
from sparse_ft.settings.lora import LoraSettings
from sparse_ft.settings.modes import FULL, is_tuned
from sparse_ft.settings.training import TrainingSettings
from sparse_ft.settings.training_data import TrainingDataSettings

__all__ = ["Ways", "ways_of_points", "why_not_comparable"]

# What makes two trainings the same but for the sparsity: how, on which weights and rows, in which precision and code.
_LORA = tuple(defaults(LoraSettings))
_NO_MATTER = ("seed", "gradient_checkpointing")  # averaged over; of memory and time
_TRAINING = (
    "max_seq_len",
    *(
        name
        for kind in (TrainingSettings, TrainingDataSettings)
        for name in named(kind, named=False, flag=True)  # what names stand for is compared instead
        if name not in (*_LORA, *_NO_MATTER)
    ),
)
_BEHIND = (
    "weights", "model_config", "tokenizer", "training_data", "train_data", "mixed_data", "chat_template",
    "dtype", "device", "versions",
)  # fmt: skip

Ways = Mapping[tuple[Any, ...], Mapping[str, set[str]]]
"""Point -> what its cells say of how they were made -> the values."""


def ways_of_points(cells: pd.DataFrame) -> Ways:
    """How the finished cells of every point (the columns of `GROUP`) were fine-tuned and scored."""
    columns = [f"cfg_{name}" for name in (*_TRAINING, *_LORA)] + [f"identity_{name}" for name in _BEHIND]
    columns += [f"protocol_{name}" for name in EVALUATION_PROTOCOL if not name.startswith("perplexity")]
    columns += ["protocol_dtype", "protocol_device"]
    columns = [name for name in columns if name in cells]
    found: dict[tuple[Any, ...], dict[str, set[str]]] = {}
    for cell in cells[cells["status"] == "FINISHED"].to_dict("records"):
        ways = found.setdefault(_point(cell), {})
        for name in columns:
            value = "unknown" if cell[name] is None else str(cell[name])
            # Of two kinds of GPU the last digits differ; a GPU and a CPU compute in different precision besides.
            ways.setdefault(name, set()).add("cpu" if value == "cpu" else "gpu" if name == "protocol_device" else value)
    return found


def why_not_comparable(row: Mapping[str, Any], base: Mapping[str, Any] | pd.Series | None, ways: Ways) -> str:
    """Why the accuracy of a point may not be divided by that of the dense baseline; empty where it may.

    Args:
        row: the point.
        base: the baseline's point; None where there is none.
        ways: from `ways_of_points`.
    """
    if math.isnan(row["accuracy"]):
        return f"it has no accuracy{' of a tuned model' if is_tuned(row['mode']) else ''}"
    if base is None:
        return f"there is no dense {'fine-tuned baseline' if is_tuned(row['mode']) else 'model that was not tuned'}"
    if not base["accuracy"] > 0:
        return f"the accuracy of the dense baseline is {base['accuracy']:.3f}"
    here, there = ways.get(_point(row), {}), ways.get(_point(base), {})
    full = FULL.name in (row["mode"], base["mode"])  # there is no adapter to compare
    for prefix, what in (
        ("protocol_", "the dense baseline was scored under another protocol"),
        ("cfg_", "the dense baseline was fine-tuned in another way"),
        ("identity_", "the dense baseline was made of something else"),
    ):
        if different := ", ".join(_differences(here, there, prefix, _LORA if full else ())):
            return f"{what} ({different})"
    return ""


def _differences(
    here: Mapping[str, set[str]], there: Mapping[str, set[str]], prefix: str, skipped: tuple[str, ...]
) -> Iterator[str]:
    for column in sorted(set(here) | set(there)):
        name = column.removeprefix(prefix)
        if not column.startswith(prefix) or name in skipped or here.get(column) == there.get(column):
            continue
        own, other = (" and ".join(sorted(side.get(column, {"unknown"}))) for side in (here, there))
        yield f"{name} {own}, the baseline's {other}"


def _point(row: Mapping[str, Any] | pd.Series) -> tuple[Any, ...]:
    return tuple(row[name] for name in GROUP)

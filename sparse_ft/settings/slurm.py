"""What a SLURM cluster is asked for, as a table on one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from sparse_ft.errors import UserError

__all__ = ["read_slurm", "slurm_text"]


def read_slurm(text: str) -> dict[str, Any] | None:
    """The table that a text is in YAML; None for ``none``.

    Raises:
        UserError: it is none.
    """
    if text == "none":
        return None
    try:
        table = yaml.safe_load(text)
    except yaml.YAMLError:
        table = None
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table):
        raise UserError(
            f"slurm is '{text}'; it must be a table such as {{partition: gpu, time: 1440, gpus_per_node: 1}}."
        )
    return table


def slurm_text(table: Mapping[str, Any] | None) -> str:
    """The text that `read_slurm` reads."""
    return "none" if table is None else json.dumps(dict(table))  # which is YAML too

"""The parts of a study's YAML: every value of its type."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_ft.errors import UserError
from sparse_ft.settings.yaml_file import LARGEST_STUDY

__all__ = ["check_study"]

_NAME = re.compile(r"\w([^/\\]{0,98}[^/\\ .])?")
_LONGEST_NAME = 200  # bytes; file systems take 255, and the folder's own files put theirs around it


def check_study(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with a name that is text, every part of its type; the grid's values are lists of plain values.

    Raises:
        UserError: the first that is wrong.
    """
    name = content.get("name", path.stem)
    if isinstance(name, bool) or not isinstance(name, (str, int, float)) or not _names_a_folder(str(name)):
        raise UserError(
            f"Study {path}: name is '{str(name)[:60]}'; it names a folder: 1 to 100 letters that can be seen, without /"
            " and \\, beginning with a letter or digit and not ending with a space or dot."
        )
    for part in ("grid", "cell", "search"):
        if not isinstance(content.get(part) or {}, dict):
            raise UserError(f"Study {path}: {part} is no table of fields and values.")
        if odd := [key for key in content.get(part) or {} if not isinstance(key, str)]:
            raise UserError(f"Study {path}: {part} has the key {str(odd[0])[:60]}, which is no field's name.")
    grid = content.get("grid") or {}
    for axis, values in grid.items():
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, (str, int, float)):
                raise UserError(f"Study {path}: the axis '{axis}' holds {str(value)[:60]}, which is no plain value.")
    cells = math.prod(len(values) if isinstance(values, list) else 1 for values in grid.values())
    if cells > LARGEST_STUDY:
        raise UserError(f"Study {path} has {cells:,} cells; the most are {LARGEST_STUDY:,}. Divide its grid.")
    return {**content, "name": str(name), "grid": grid}


def _names_a_folder(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and name.isprintable() and len(name.encode()) <= _LONGEST_NAME

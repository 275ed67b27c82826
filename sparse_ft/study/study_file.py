"""A study's YAML, read as what anybody may have written: bounded, without doubles, every value of its type."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from sparse_ft.errors import UserError
from sparse_ft.files import YamlLoader

__all__ = ["check_study", "read_study"]

_LARGEST_FILE = 1 << 20  # bytes
_LARGEST_STUDY = 100_000  # values in the file, aliases written out; cells of a grid
_NAME = re.compile(r"\w([^/\\]{0,98}[^/\\ .])?")
_LONGEST_NAME = 200  # bytes; file systems take 255, and the folder's own files put theirs around it


def read_study(path: Path, what: str = "Study") -> Any:
    """What the YAML file says, as plain data; ``what`` names it in messages.

    Raises:
        UserError: it cannot be read, is not YAML, names a key twice, or grows without end.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist; configs/ holds examples.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise UserError(f"{what} {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if len(content) > _LARGEST_FILE:
        raise UserError(f"{what} {path} is larger than {_LARGEST_FILE} bytes; is it the right file?")
    try:
        loader = YamlLoader(content.decode("utf-8-sig"))
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _size(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise UserError(f"{what} {path} is nested too deeply.") from None
    except MemoryError:
        raise UserError(f"{what} {path} needs more memory than this process may take.") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, AttributeError, KeyError, IndexError) as error:
        raise UserError(f"{what} {path} is not valid YAML: {' '.join(str(error).split())[:300]}") from None


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
    if cells > _LARGEST_STUDY:
        raise UserError(f"Study {path} has {cells:,} cells; the most are {_LARGEST_STUDY:,}. Divide its grid.")
    return {**content, "name": str(name), "grid": grid}


def _names_a_folder(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and name.isprintable() and len(name.encode()) <= _LONGEST_NAME


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below a node, every alias counted as often as it is used; also refuses doubled keys."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in known:
        if known[id(node)] == 0:
            raise ValueError("a value contains itself")
        return known[id(node)]
    known[id(node)] = 0
    parts = node.value
    if isinstance(node, yaml.MappingNode):
        keys: list[Hashable] = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if double := [key for number, key in enumerate(keys) if key in keys[:number] and key != "<<"]:
            raise ValueError(f"the key '{double[0]}' stands there twice")
        parts = [part for pair in node.value for part in pair]
    size = 1 + sum(_size(part, known) for part in parts)
    if size > _LARGEST_STUDY:
        raise ValueError(f"it has more than {_LARGEST_STUDY} values")
    known[id(node)] = size
    return size

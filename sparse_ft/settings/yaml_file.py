"""YAML as anybody may have written it: bounded, safe, without doubled keys."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from sparse_ft.errors import UserError
from sparse_ft.files import YamlLoader

__all__ = ["LARGEST_STUDY", "read_yaml"]

LARGEST_STUDY = 100_000  # values in the file, aliases written out; cells of a grid
_LARGEST_FILE = 1 << 20  # bytes


def read_yaml(path: Path, what: str = "Study") -> Any:
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
    if size > LARGEST_STUDY:
        raise ValueError(f"it has more than {LARGEST_STUDY} values")
    known[id(node)] = size
    return size

"""Files that are whole or absent: written beside their place and moved there at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import yaml

__all__ = ["YamlLoader", "atomic_folder", "atomic_path", "load_yaml", "write_json", "write_text"]


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, with its suffix; moves it there when the block ends well.

    A killed or failed write leaves the old file or none. The suffix is kept because writers
    (numpy, matplotlib) choose the format by it.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.{uuid.uuid4().hex[:8]}.part{target.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as stream:  # the rename must not overtake the data on a crash
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside ``path`` and moves it there when the block ends well.

    An existing folder is replaced; it is gone only once the new one is complete.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:8]
    temporary = target.with_name(f".{target.name}.{token}.part")
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            old = target.with_name(f".{target.name}.{token}.old")
            os.replace(target, old)
            os.replace(temporary, target)
            shutil.rmtree(old)
        else:
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> Path:
    """Writes ``text`` as UTF-8, atomically; returns the path."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, value: Any) -> Path:
    """Writes ``value`` as indented JSON, atomically; NaN and infinities are refused (they are not JSON).

    Raises:
        ValueError: ``value`` holds a NaN or an infinity.
    """
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


class YamlLoader(yaml.SafeLoader):
    """YAML with the numbers of YAML 1.2: ``1e-4`` is one, ``2:4`` and ``2026-01-02`` are text."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, regex) for tag, regex in rows if tag.rsplit(":", 1)[1] not in ("int", "float", "timestamp")]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _whole(loader: YamlLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "").lower()
    base = 16 if "0x" in text else 8 if "0o" in text else 10
    return int(text, base)


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?([0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^([-+]?(\.[0-9]+|[0-9][0-9_]*\.[0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|"
        r"\.(nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)
YamlLoader.add_constructor("tag:yaml.org,2002:int", _whole)


def load_yaml(text: str) -> Any:
    """Plain data from YAML, with numbers wherever YAML 1.2 writes them.

    Raises:
        yaml.YAMLError: text that is no YAML.
    """
    return yaml.load(text, Loader=YamlLoader)

"""Configurations as the strings that MLflow keeps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

__all__ = ["flatten_config", "text_of"]


def flatten_config(config: Any, prefix: str = "cfg") -> dict[str, str]:
    """A configuration (mapping or dataclass, nested) as parameters: ``cfg/lora/r`` -> ``16``.

    Lists become JSON, ``None`` becomes ``none``, numbers are written as Python writes them, so that the
    same configuration gives the same strings whatever way it was typed.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        flat: dict[str, str] = {}
        for key, value in config.items():
            flat.update(flatten_config(value, f"{prefix}/{key}" if prefix else str(key)))
        return flat
    return {prefix: text_of(config)}


def text_of(value: Any) -> str:
    """One value as a parameter or a tag."""
    if isinstance(value, Enum):
        return text_of(value.value)
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, default=str, ensure_ascii=False)
    return str(value)

"""Typed dataclasses from a command line, a YAML file or plain values; one line for whoever mistyped."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from jsonargparse import ArgumentError, ArgumentParser

from sparse_ft.errors import UserError
from sparse_ft.settings.paths import normal_path
from sparse_ft.settings.renamed import RENAMED
from sparse_ft.settings.yaml_file import read_yaml

__all__ = ["Parser"]

T = TypeVar("T")
_LONGEST = 4096  # characters of a value
_LARGEST = 2**63  # of whole numbers: what a machine's integers hold
_OPENS, _MOST_OPENS = (
    re.compile(r"[\[{]|[-?:]\s"),
    100,
)  # of a value's YAML: its parser, in C, ends the process at 10,000
_REFUSALS = (ArgumentError, ValueError, RecursionError, MemoryError, UserError)


class Parser(Generic[T]):
    """Reads instances of one config dataclass; the help texts are its ``Args``.

    Args:
        kind: a dataclass with defaults.
        program: what the usage line shows.
    """

    def __init__(self, kind: type[T], program: str = ""):
        self._kind = kind
        self._names = [entry.name for entry in fields(kind)]
        self._counts = {entry.name for entry in fields(kind) if str(entry.type).startswith(("int", "Count"))}
        self._numbers = self._counts | {entry.name for entry in fields(kind) if str(entry.type).startswith("float")}
        self._switches = {entry.name for entry in fields(kind) if entry.type in (bool, "bool")}
        summary = (kind.__doc__ or "").split("Args:")[0].strip()
        self._parser = ArgumentParser(prog=program or None, description=summary, exit_on_error=False)
        if "config" not in self._names:  # the sweep's own parameter has that name
            self._parser.add_argument("--config", help="YAML file with any of these values.")
        self._parser.add_class_arguments(kind, as_group=False)

    def arguments(self, argv: Sequence[str]) -> T:
        """The instance that a command line asks for; ``--help`` prints and exits.

        Raises:
            UserError: an unknown flag or a value of the wrong type.
        """
        words = self._plain(self._with_files(argv))
        try:
            for word in words:
                _check_text("a parameter", word)
            values = vars(self._parser.parse_args(words))
            return self._made(values)
        except _REFUSALS as error:
            raise UserError(_explain(error)) from None

    def _with_files(self, argv: Sequence[str]) -> list[str]:
        """The command line with the values of a ``--config`` file in its place, so that later flags hold."""
        if "config" in self._names:
            return list(argv)
        result, words = [], iter(argv)
        for word in words:
            flag, equals, path = word.partition("=")
            if flag != "--config":
                result.append(word)
                continue
            path = Path(normal_path("config", path if equals else next(words, "")))
            content = read_yaml(path, "Configuration")
            if not isinstance(content, dict):
                raise UserError(f"Configuration {path} is no table of parameters and values.")
            given = self.values(content, f"Configuration {path}")
            result += [f"--{name}={_word(getattr(given, name))}" for name in self._names if name in content]
        return result

    def _made(self, values: Mapping[str, Any]) -> T:
        """The instance of parsed values: numbers that a machine can count with, paths in one spelling."""
        made = {}
        for name in self._names:
            value = made[name] = values[name]
            if value is None:
                raise UserError(f"{name} is empty; give a value, or leave it out.")
            if isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
                raise UserError(f"{name} is {str(value)[:20]}...; that is more than a machine's integers hold.")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{name} is {value}; it must be a finite number.")
            if isinstance(value, str):
                made[name] = normal_path(name, value)
        return self._kind(**made)

    def _plain(self, argv: Sequence[str]) -> list[str]:
        """Flags as people type them: ``--dry-run`` is ``--dry_run true``."""
        result: list[str] = []
        for number, word in enumerate(argv):
            name, equals, value = word.partition("=")
            plain = name.removeprefix("--").replace("-", "_")
            if not name.startswith("--") or plain not in self._names:
                result.append(word)
                continue
            result.append(f"--{plain}{equals}{value}")
            follows = argv[number + 1] if number + 1 < len(argv) else "--"
            if plain in self._switches and not equals and follows.startswith("--"):
                result.append("true")
        return result

    def is_count(self, name: str) -> bool:
        """Whether a field holds whole numbers."""
        return name in self._counts

    def is_number(self, name: str) -> bool:
        """Whether a field holds numbers."""
        return name in self._numbers

    def _whole(self, name: str, value: Any) -> Any:
        """A whole number that was written as another: ``1e2``."""
        return int(value) if name in self._counts and isinstance(value, float) and value.is_integer() else value

    def values(self, values: Mapping[str, Any], where: str) -> T:
        """The instance with the given fields, the rest at their defaults.

        Raises:
            UserError: an unknown field or a value of the wrong type; ``where`` begins the message.
        """
        unknown = sorted(set(values) - set(self._names))
        if unknown:
            raise UserError(f"{where}: there is no field '{unknown[0]}'. Fields: {', '.join(sorted(self._names))}.")
        try:
            given = {name: value for name, value in values.items() if value is not None}
            for name, value in given.items():
                _check_text(name, value)
            parsed = vars(self._parser.parse_object({name: self._whole(name, v) for name, v in given.items()}))
            return self._made(parsed | dict.fromkeys(set(values) - set(given)))
        except _REFUSALS as error:
            raise UserError(f"{where}: {_explain(error)}") from None


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, (str, int, float)):
        raise UserError(f"{name} is {str(value)[:60]}; it must be a plain value.")
    if isinstance(value, str) and (len(value) > _LONGEST or len(_OPENS.findall(value)) > _MOST_OPENS):
        raise UserError(f"{name[:60]} has the value {value[:60]}...; no parameter is that long or nested.")


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _explain(error: Exception) -> str:
    """jsonargparse's report in one sentence: which value of which parameter, and what it may be."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    match = re.match(r'(?:.*?)[Pp]arser key "([^"]+)":? (.*)', text)
    if not match:
        return f"{text}. See --help."
    name, rest = match.groups()
    value = re.search(r"(?:Got|Given) value: (.*)$", rest)
    if value and (name, value[1]) in RENAMED:
        return f"{name}={value[1]} is written {RENAMED[name, value[1]]} since version 0.2."
    choices = re.findall(r"Literal\[([^\]]*)\]", rest)
    types = re.findall(r"<class '(\w+)'>", rest)
    named = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    expected = [named.get(kind, kind) for kind in dict.fromkeys(types) if not (kind == "str" and choices)]
    if choices:
        expected.append(choices[0].replace("'", "").replace(", ", " | "))
    if not value or not expected:
        return f"{name}: {rest}"
    return f"{name} is '{value.group(1)}'; it must be {' or '.join(expected)}."

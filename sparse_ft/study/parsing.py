"""Typed dataclasses from a command line, a YAML file or plain values; one line for whoever mistyped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Generic, TypeVar

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

from sparse_ft.errors import UserError

__all__ = ["Parser"]

T = TypeVar("T")


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
            self._parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these values.")
        self._parser.add_class_arguments(kind, as_group=False)

    def arguments(self, argv: Sequence[str]) -> T:
        """The instance that a command line asks for; ``--help`` prints and exits.

        Raises:
            UserError: an unknown flag or a value of the wrong type.
        """
        try:
            values = vars(self._parser.parse_args(self._plain(argv)))
        except ArgumentError as error:
            raise UserError(_explain(error, argv)) from None
        return self._kind(**{name: values[name] for name in self._names})

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
            parsed = vars(self._parser.parse_object({name: self._whole(name, v) for name, v in values.items()}))
        except ArgumentError as error:
            raise UserError(f"{where}: {_explain(error)}") from None
        return self._kind(**{name: parsed[name] for name in self._names})


def _explain(error: ArgumentError, argv: Sequence[str] = ()) -> str:
    """jsonargparse's report in one sentence: which value of which parameter, and what it may be."""
    text = " ".join(str(error).split())
    match = re.match(r'(?:.*?)[Pp]arser key "([^"]+)":? (.*)', text)
    if not match:
        return f"{text}. See --help."
    name, rest = match.groups()
    value = re.search(r"(?:Got|Given) value: (.*)$", rest)
    choices = re.findall(r"Literal\[([^\]]*)\]", rest)
    types = re.findall(r"<class '(\w+)'>", rest)
    named = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    expected = [named.get(kind, kind) for kind in dict.fromkeys(types) if not (kind == "str" and choices)]
    if choices:
        expected.append(choices[0].replace("'", "").replace(", ", " | "))
    if not value or not expected:
        return f"{name}: {rest}"
    return f"{name} is '{value.group(1)}'; it must be {' or '.join(expected)}."

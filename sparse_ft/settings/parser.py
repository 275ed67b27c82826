"""Typed dataclasses from a command line, a YAML file or plain values; one line for whoever mistyped."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from sparse_ft.errors import UserError
from sparse_ft.settings.field import is_flag, is_optional, plain, plain_values
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
    """Reads instances of one settings class; its fields are the flags.

    Args:
        kind: see `sparse_ft.settings.field`.
        program: what the usage line shows.
    """

    def __init__(self, kind: type[T], program: str = ""):
        self._kind = kind
        self._fields = {entry.name: entry for entry in fields(kind) if is_flag(entry)}
        self._parser = ArgumentParser(prog=program or None, description=kind.__doc__, exit_on_error=False)
        if "config" not in self._fields:  # the sweep's own parameter has that name
            self._parser.add_argument("--config", help="YAML file with any of these values.")
        hints = get_type_hints(kind)
        for name, entry in self._fields.items():
            default = {"required": True} if entry.default is MISSING else {"default": plain(entry, entry.default)}
            kind_of = _type(entry, hints[name])
            self._parser.add_argument(f"--{name}", type=kind_of, help=entry.metadata["help"], **default)

    @cached_property
    def _defaults(self) -> dict[str, Any]:
        """Of all fields, as jsonargparse reads them: once, and not at every call."""
        return self._parser.get_defaults().as_dict()

    def arguments(self, argv: Sequence[str]) -> T:
        """The instance that a command line asks for; ``--help`` prints and exits.

        Raises:
            UserError: an unknown flag or a value of the wrong type.
        """
        words = self._plain(self._with_files(argv))
        try:
            for word in words:
                _check_text("a parameter", word)
            return self._made(self._defaults | self._parser.parse_args(words, defaults=False).as_dict())
        except _REFUSALS as error:
            raise UserError(_explain(error)) from None

    def _with_files(self, argv: Sequence[str]) -> list[str]:
        """The command line with the values of a ``--config`` file in its place, so that later flags hold."""
        if "config" in self._fields:
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
            result += [f"--{name}={_word(value)}" for name, value in plain_values(given).items() if name in content]
        return result

    def _made(self, values: Mapping[str, Any]) -> T:
        """The instance of parsed values: numbers that a machine can count with, paths in one spelling, None for
        ``none``."""
        made, problems = {}, []
        for name, entry in self._fields.items():
            value, about = values[name], entry.metadata
            if about["read"] is not None and value is not None:
                try:
                    value = about["read"](value)
                except UserError as error:  # said with all else that is wrong
                    problems.append(str(error))
                    value = entry.default
            elif is_optional(entry):
                value = None if value == "none" else value
            elif value is None:
                raise UserError(f"{name} is empty; give a value, or leave it out.")
            if isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
                raise UserError(f"{name} is {str(value)[:20]}...; that is more than a machine's integers hold.")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{name} is {value}; it must be a finite number.")
            if isinstance(value, str) and about["path"] is not None:
                value = normal_path(name, value, (*about["path"], *(["none"] if is_optional(entry) else [])))
            made[name] = value
        settings = self._kind(**made)
        if problems:
            raise UserError(" ".join(dict.fromkeys([*problems, *settings.problems()])))
        return settings

    def _plain(self, argv: Sequence[str]) -> list[str]:
        """Flags as people type them: ``--dry-run`` is ``--dry_run true``."""
        result: list[str] = []
        for number, word in enumerate(argv):
            name, equals, value = word.partition("=")
            flag = name.removeprefix("--").replace("-", "_")
            if not name.startswith("--") or flag not in self._fields:
                result.append(word)
                continue
            result.append(f"--{flag}{equals}{value}")
            follows = argv[number + 1] if number + 1 < len(argv) else "--"
            if self._fields[flag].type == "bool" and not equals and follows.startswith("--"):
                result.append("true")
        return result

    def is_count(self, name: str) -> bool:
        """Whether a field holds whole numbers."""
        return self._fields[name].type.startswith("int")

    def is_number(self, name: str) -> bool:
        """Whether a field holds numbers."""
        return self._fields[name].type.startswith(("int", "float"))

    def _given(self, name: str, value: Any) -> Any:
        """A value as a flag would give it: a whole number that was written as another (``1e2``), a list as text."""
        reads = self._fields[name].metadata["read"] is not None
        if reads and isinstance(value, (list, tuple)):
            value = ",".join(map(str, value))
        _check_text(name, value)
        if reads:
            return str(value)
        return int(value) if self.is_count(name) and isinstance(value, float) and value.is_integer() else value

    def values(self, values: Mapping[str, Any], where: str) -> T:
        """The instance with the given fields, the rest at their defaults.

        Raises:
            UserError: an unknown field or a value of the wrong type; ``where`` begins the message.
        """
        unknown = sorted(set(values) - set(self._fields))
        if unknown:
            near = get_close_matches(unknown[0], self._fields, cutoff=0.7)
            known = f"Near it are: {', '.join(near)}" if near else f"Fields: {', '.join(sorted(self._fields))}"
            raise UserError(f"{where}: there is no field '{unknown[0]}'. {known}.")
        try:
            given = {name: self._given(name, value) for name, value in values.items() if value is not None}
            parsed = self._defaults | self._parser.parse_object(given, defaults=False).as_dict()
            return self._made(parsed | dict.fromkeys(set(values) - set(given)))
        except _REFUSALS as error:
            raise UserError(f"{where}: {_explain(error)}") from None


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, (str, int, float)):
        raise UserError(f"{name} is {str(value)[:60]}; it must be a plain value.")
    if isinstance(value, str) and (len(value) > _LONGEST or len(_OPENS.findall(value)) > _MOST_OPENS):
        raise UserError(f"{name[:60]} has the value {value[:60]}...; no parameter is that long or nested.")


def _type(entry: Field, hint: Any) -> Any:
    """What jsonargparse reads a field as; ``none`` is a word to it."""
    about, none = entry.metadata, ("none",) if is_optional(entry) else ()
    if about["choices"]:
        return Literal[(*about["choices"], *none)]
    kinds = tuple(kind for kind in get_args(hint) if kind is not NoneType) or (hint,)
    if about["read"] is not None or str in kinds:
        return str
    return Union[(*kinds, Literal[none])] if none else hint


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

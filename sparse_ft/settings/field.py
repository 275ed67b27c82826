"""A parameter is written once, at its field: its default, what it is for, what it may be, and what it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any, TypeVar

from sparse_ft.errors import UserError

__all__ = [
    "Settings",
    "defaults",
    "is_flag",
    "is_optional",
    "named",
    "part_of",
    "plain",
    "plain_values",
    "setting",
    "unsaid",
]

T = TypeVar("T")


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    choices: Sequence[str] = (),
    least: float | None = None,
    most: float | None = None,
    path: Sequence[str] | None = None,
    read: Callable[[str], Any] | None = None,
    write: Callable[[Any], str] | None = None,
    flag: bool = True,
    result: bool = True,
    masks: bool = False,
    needed: bool = False,
    named: bool = False,
    behind: str = "",
    time: bool = True,
    later: bool = False,
) -> Any:
    """A field of a settings dataclass, with everything that is to be known of it.

    A field typed ``X | None`` is written ``none`` in flags, files and logs.

    Args:
        default: left out, the flag is required.
        help: of the flag.
        choices: the words that it may be.
        least: the smallest number that it may be.
        most: the largest.
        path: it holds a path, or one of these words.
        read: from the text of a flag or a file to the value; ``write`` is the way back.
        flag: whether it is a flag and a key in files, or set in Python alone.
        result: whether a cell's result depends on it.
        masks: whether it tells mask sets apart.
        needed: whether it decides which model, data or masks a cell needs.
        named: whether it is a name, and a cell's identity holds what it stands for.
        behind: a value of that identity; a run that has it is told from others by it, and not by the name.
        time: whether it changes how long a cell takes.
        later: whether keys were made before it was there: at its default it stands in none.
    """
    about = {name: value for name, value in locals().items() if name != "default"}
    return field(default=default, metadata=about)


def named(kind: Any, **marks: bool) -> tuple[str, ...]:
    """The fields of a settings class whose marks are these: ``named(CellConfig, result=False)``."""
    return tuple(e.name for e in fields(kind) if all(e.metadata[mark] == value for mark, value in marks.items()))


def defaults(kind: type) -> dict[str, Any]:
    """The default of every field of ``kind``."""
    return {entry.name: entry.default for entry in fields(kind)}


def part_of(kind: type, settings: Any) -> dict[str, Any]:
    """The values that ``settings`` has of the fields of ``kind``, which they may be composed of."""
    return {entry.name: getattr(settings, entry.name) for entry in fields(kind) if hasattr(settings, entry.name)}


def plain_values(settings: Any) -> dict[str, Any]:
    """The value of every flag as a file holds it: a word, a number, true or false."""
    return {entry.name: plain(entry, getattr(settings, entry.name)) for entry in fields(settings) if is_flag(entry)}


def unsaid(settings: Any) -> set[str]:
    """The fields that keys do not speak of, so that those made before such a field was there stay what they are."""
    return {e.name for e in fields(settings) if e.metadata["later"] and getattr(settings, e.name) == e.default}


def plain(entry: Field, value: Any) -> Any:
    """One value as a file holds it."""
    if (write := entry.metadata["write"]) is not None:
        return write(value)
    return "none" if value is None else value


def is_flag(entry: Field) -> bool:
    """Whether a field is a flag."""
    return entry.metadata["flag"]


def is_optional(entry: Field) -> bool:
    """Whether a field may be ``none``."""
    return entry.metadata["read"] is None and str(entry.type).endswith("| None")


class Settings:
    """What all settings can do: say what is wrong with them."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one sentence each. A part adds its own."""
        for entry in fields(self):
            about, value = entry.metadata, getattr(self, entry.name)
            allowed = (*about["choices"], None) if is_optional(entry) else about["choices"]
            if about["choices"] and value not in allowed and not callable(value):
                yield f"{entry.name} '{value}' is none of {', '.join(about['choices'])}."
            least, most = about["least"], about["most"]
            if not isinstance(value, (int, float)) or (least is None and most is None):
                continue
            if most is not None and not least <= value <= most:
                yield f"{entry.name} is {value}; it must lie between {least} and {most}."
            elif not value >= least:
                yield f"{entry.name} is {value}; it must be at least {least}."

    def check(self) -> None:
        """Refuses values that make no sense.

        Raises:
            UserError: naming all of them, in one line.
        """
        if problems := list(dict.fromkeys(self.problems())):
            raise UserError(" ".join(problems))
